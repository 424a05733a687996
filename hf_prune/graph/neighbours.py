"""Which layers each layer reads from, and what scales the channels on the way; found along the traced operations.

From every layer the walk goes back along whatever still has the dim that the layer reads: through pointwise functions,
norms, pools, views, depthwise convolutions and the value side of attention, up to the layers that write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from hf_prune.graph.axes import Axis, Cat, Dim, flat, leaves, parts, size
from hf_prune.graph.constants import find_layer
from hf_prune.graph.graph import Graph
from hf_prune.graph.rules import name_of
from hf_prune.graph.rules.pointwise import RESIDUAL
from hf_prune.graph.trace import Operation

PRODUCTS = ("matmul", "bmm", "einsum", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Diagonal:
    """A factor for each channel: `tensor` (kernels by their norm), over the root of `variance` and `eps` for a norm."""

    dim: Dim
    tensor: str | None
    variance: str | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class Edge:
    """The outputs of layer `writer` reach the inputs of layer `reader`, each an index into `Neighbours.layers`.

    `writer` None: a residual stream or an input of the model, whose channels are all alike. `product`: the two do not
    follow each other, their outputs are multiplied and summed, as queries and keys are. `direct` is False for a
    depthwise convolution on the way, which is also among the `diagonals`.
    """

    writer: int | None
    reader: int
    diagonals: tuple[Diagonal, ...] = ()
    product: bool = False
    direct: bool = True


Path = tuple[Operation, tuple[Diagonal, ...], bool]
"""A node (None: the end of the walk), the diagonals from there on, and `Edge.direct`."""


class Neighbours:
    """Layers of a graph in the order in which they run, and the edges between them.

    through_streams: also follow residual streams, to every layer that adds into them; otherwise they end the walk.
    """

    def __init__(self, graph: Graph, through_streams: bool = False) -> None:
        self.flow, self.through_streams = graph.flow, through_streams
        found = [(node, find_layer(graph.flow, node)) for node in graph.flow.trace.graph.nodes]
        self.nodes = [node for node, layer in found if layer is not None]
        self.layers = [layer for _, layer in found if layer is not None]
        self._numbers = {node: number for number, node in enumerate(self.nodes)}

    @cached_property
    def edges(self) -> list[Edge]:
        """Every edge once."""
        found = []
        for reader, layer in enumerate(self.layers):
            if layer.grouped and not self.is_depthwise(reader):
                continue  # an input channel of such a weight depends on the row; not followed
            for node, diagonals, direct in self._back(layer.source, self.read_dim(reader)):
                found.append(Edge(self._numbers.get(node), reader, diagonals, direct=direct))
        return found + list(self._products())

    def is_depthwise(self, number: int) -> bool:
        """Whether each output channel of layer `number` has one input channel of its own."""
        layer = self.layers[number]
        shape = self.flow.tensors[layer.weight].sizes
        return layer.grouped and shape[1] == 1 and size(self.read_dim(number)) == shape[0]

    def read_dim(self, number: int) -> Dim:
        """The dim that layer `number` reads."""
        layer = self.layers[number]
        rank = len(self.flow.tensors[layer.weight])
        return self.flow.shapes[layer.source][1 - rank if rank > 2 else -1]

    def written_dim(self, number: int) -> Dim:
        """The dim that layer `number` writes."""
        return self.flow.tensors[self.layers[number].weight][1 - self.layers[number].reads]

    def _back(self, node: Any, dim: Dim) -> Iterator[Path]:
        """Where `dim` of `node` comes from: layers, or the node at which the walk ends."""
        stack: list[tuple[Any, frozenset[Axis], tuple[Diagonal, ...]]] = [(node, frozenset(leaves(dim)), ())]
        stops = not self.through_streams and any("stream" in leaf.marks for leaf in leaves(dim))
        seen: set[Node] = set()
        while stack:
            node, wanted, diagonals = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._numbers:
                number = self._numbers[node]
                layer = self.layers[number]
                if not self.is_depthwise(number):
                    yield (None, (), True) if stops else (node, diagonals, True)
                    continue
                yield node, diagonals, False
                own = Diagonal(self.flow.tensors[layer.weight][0], layer.weight)
                stack.append((layer.source, wanted, (*diagonals, own)))
                continue
            sources = list(self._sources(node, wanted))
            if not sources or (stops and _joins(node, sources)):
                yield None, diagonals, True
                continue
            scaled = (*diagonals, *self._scaled_by(node))
            stack += [(source, wanted & self._axes(source) or wanted, scaled) for source in sources]

    def _sources(self, node: Operation, wanted: frozenset[Axis]) -> Iterator[Operation]:
        """Those arguments of `node` through which the wanted axes come."""
        if node.op != "call_function" or name_of(node.target) == "embedding":
            return
        name, arguments = name_of(node.target), [each for each in node.all_input_nodes if not self.flow.is_weight(each)]
        if name == "scaled_dot_product_attention":
            arguments = [node.args[2]]
        for each in arguments:
            shared = wanted & self._axes(each)
            if shared == wanted or (shared and name not in PRODUCTS):
                yield each

    def _axes(self, node: Operation) -> frozenset[Axis]:
        shape = self.flow.shapes.get(node)
        shapes = shape if isinstance(shape, list) else [shape or ()]
        return frozenset(leaf for each in shapes for dim in each for leaf in leaves(dim))

    def _scaled_by(self, node: Operation) -> Iterator[Diagonal]:
        """Per-channel factors that `node` applies: norms by their scale, products with a vector of the model."""
        name, names = name_of(node.target), self.flow.trace.tensors
        if name == "batch_norm" and node.args[4] in names and not node.args[5]:
            variance = names[node.args[4]]
            yield Diagonal(self.flow.tensors[variance][0], names.get(node.args[1]), variance, float(node.args[7]))
        elif name in ("layer_norm", "rms_norm", "group_norm", "mul"):
            for each in node.all_input_nodes:
                bias = name != "mul" and len(node.args) > 3 and each is node.args[3]
                if each in names and len(self.flow.tensors[names[each]]) == 1 and not bias:
                    yield Diagonal(self.flow.tensors[names[each]][0], names[each])

    def _products(self) -> Iterator[Edge]:
        """Pairs of layers whose outputs are multiplied with each other and summed: queries and keys."""
        for node in self.flow.trace.graph.nodes:
            if node.op != "call_function" or name_of(node.target) not in ("matmul", "scaled_dot_product_attention"):
                continue
            left, right = node.args[0], node.args[1]
            if self.flow.is_weight(left) or self.flow.is_weight(right):
                continue
            width, heads = self.flow.shapes[left][-1], self.flow.shapes[left][-3:-2]
            summed = (*(axis for dim in heads for axis in dim), *width)
            sides = [list(self._written_behind(side, summed)) for side in (left, right)]
            for first, before in sides[0]:
                for second, after in sides[1]:
                    yield Edge(first, second, (*before, *after), product=True)
                    yield Edge(second, first, (*before, *after), product=True)

    def _written_behind(self, node: Operation, dim: Dim) -> Iterator[tuple[int, tuple[Diagonal, ...]]]:
        """Layers that write `dim` of `node`, not only a part of it."""
        for found, diagonals, direct in self._back(node, dim):
            if found is not None and found in self._numbers and direct:
                written = set(leaves(self.written_dim(self._numbers[found])))
                if written <= set(leaves(dim)) or written >= set(leaves(dim)):
                    yield self._numbers[found], diagonals


def _joins(node: Operation, sources: list[Operation]) -> bool:
    return name_of(node.target) in RESIDUAL and len(sources) > 1


def carry(values: Tensor, source: Dim, target: Dim) -> Tensor | None:
    """`values`, one for each index of `source`, as one for each index of `target`; None where it cannot be told.

    Axes that only the source has are summed over, axes that only the target has repeat the value; places of the target
    that the source says nothing about are zero. A piece of the target that several pieces of the source could be is
    not guessed.
    """
    starts = _starts(source)
    out, matched = [], False
    for piece in parts(target):
        near = [(start, each) for start, each in starts if _related(each, piece)]
        if len(near) > 1:
            return None
        out.append(_aligned(values, *near[0], piece) if near else values.new_zeros(size(piece)))
        matched = matched or bool(near)
    return torch.cat(out) if matched else None


def _starts(dim: Dim) -> list[tuple[int, Dim]]:
    found, start = [], 0
    for piece in parts(dim):
        found.append((start, piece))
        start += size(piece)
    return found


def _related(one: Dim, other: Dim) -> bool:
    """Whether one of two products has all axes of the other; concatenations inside are not looked into."""
    first, second = set(flat(one)), set(flat(other))
    if any(isinstance(axis.form, Cat) for axis in first | second) and first != second:
        return False
    return bool(first & second) and (first <= second or second <= first)


def _aligned(values: Tensor, start: int, source: Dim, target: Dim) -> Tensor:
    have, want = flat(source), flat(target)
    own = values[start : start + prod(axis.size for axis in have)].view([axis.size for axis in have])
    gone = [place for place, axis in enumerate(have) if axis not in want]
    own = own.sum(gone) if gone else own
    left = [axis for axis in have if axis in want]
    own = own.permute([left.index(axis) for axis in want if axis in left])
    return (
        own.reshape([axis.size if axis in left else 1 for axis in want]).expand([axis.size for axis in want]).flatten()
    )
