"""How strongly each channel of a layer is written by the layers before it and read by those after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hf_prune.graph.axes import Dim, size
from hf_prune.graph.neighbours import Diagonal, Edge, Neighbours, carry


class Energies:
    """Energies by the layer's number in `neighbours`.

    weights: every tensor of the layers and scales between them, by name.
    rates: weight -> how active each of its inputs is, `(inputs,)`; 1 where it is missing.
    """

    def __init__(self, neighbours: Neighbours, weights: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> None:
        self.neighbours, self.weights, self.rates = neighbours, weights, rates

    def before(self, number: int) -> Tensor:
        """What arrives at each input, shaped to multiply the weight: `||row j of W_{l-1}||^2` times the scales."""
        edges = [edge for edge in self.neighbours.edges if edge.reader == number and edge.direct and not edge.product]
        dim, arriving = self.neighbours.read_dim(number), []
        for edge in edges:
            scale = self._scale(number, edge, dim)
            if edge.writer is not None:
                scale = scale * self._carried(self._energy(edge.writer, reads=False), self._written(edge.writer), dim)
            arriving.append(scale)
        return self._along(number, arriving, reads=True)

    def after(self, number: int) -> Tensor:
        """What becomes of each output, shaped to multiply the weight: `||column i of W_{l+1}||^2` times the scales."""
        used, written = [], self._written(number)
        for edge in self.neighbours.edges:
            if edge.writer != number or (self.neighbours.is_depthwise(edge.reader) and not edge.product):
                continue  # a depthwise convolution is a scale on the way to what reads it
            dim = self._written(edge.reader) if edge.product else self.neighbours.read_dim(edge.reader)
            energy = self._energy(edge.reader, reads=not edge.product) * self._scale(edge.reader, edge, dim)
            used.append(self._carried(energy, dim, written))
        return self._along(number, used, reads=False)

    def _written(self, number: int) -> Dim:
        return self.neighbours.written_dim(number)

    def _energy(self, number: int, *, reads: bool) -> Tensor:
        """Squares of the weights of each input or output channel, `(channels,)`."""
        weight = self.weights[self.neighbours.layers[number].weight]
        return weight.square().movedim(self._place(number, reads), 0).flatten(1).sum(1)

    def _place(self, number: int, reads: bool) -> int:
        """Which dimension of the layer's weight counts its inputs or outputs."""
        layer = self.neighbours.layers[number]
        return 0 if self.neighbours.is_depthwise(number) else layer.reads if reads else 1 - layer.reads

    def _scale(self, reader: int, edge: Edge, dim: Dim) -> Tensor:
        """Squared scales on the way, and the activity where `reader` takes in what a layer wrote; over `dim`."""
        weight = self.neighbours.layers[reader].weight
        scale = torch.ones(size(dim), dtype=self.weights[weight].dtype, device=self.weights[weight].device)
        for each in edge.diagonals:
            scale = scale * self._carried(self._squared(each), each.dim, dim)
        return scale * self.rates[weight] if weight in self.rates and not edge.product else scale

    def _squared(self, diagonal: Diagonal) -> Tensor:
        """f^2, f = gamma / sigma where statistics are fixed, else gamma; of a depthwise kernel, its norm."""
        squared: Any = 1.0
        if diagonal.tensor is not None:
            squared = self.weights[diagonal.tensor].flatten(1 if self.weights[diagonal.tensor].ndim > 1 else 0).square()
            squared = squared.sum(1) if squared.ndim > 1 else squared
        return squared if diagonal.variance is None else squared / (self.weights[diagonal.variance] + diagonal.eps)

    def _carried(self, values: Tensor, source: Dim, target: Dim) -> Tensor:
        """`values` over the indices of `target`; ones where it cannot be told which are meant."""
        carried = carry(values, source, target)
        return values.new_ones(size(target)) if carried is None else carried

    def _along(self, number: int, factors: Sequence[Tensor], *, reads: bool) -> Tensor:
        weight = self.weights[self.neighbours.layers[number].weight]
        total = reduce(torch.add, factors) if factors else weight.new_ones(1)
        return total.view([-1 if dim == self._place(number, reads) else 1 for dim in range(weight.ndim)])
