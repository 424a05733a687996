"""Which indices of a dimension stay when units of its axes go, and the tensors that these make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.graph.axes import Axis, Cat, Dim, flat, leaves, size
from hf_prune.graph.graph import Graph
from hf_prune.types import Plan

Kept = Mapping[Axis, Tensor]
"""Axis that loses units -> indices of those that stay."""


def kept_axes(graph: Graph, plan: Plan) -> Kept:
    """The axes of `graph` that lose units under `plan`."""
    return {graph.axes[name]: keep.nonzero().flatten().cpu() for name, keep in plan.items() if not keep.all()}


def kept_entries(graph: Graph, plan: Plan) -> dict[str, list[Tensor]]:
    """Tensor that loses entries under `plan` -> indices of each of its dimensions that stay, ascending."""
    kept = kept_axes(graph, plan)
    return {
        name: [kept_indices(dim, kept) for dim in shape]
        for name, shape in graph.flow.tensors.items()
        if any(loses(dim, kept) for dim in shape)
    }


def select(tensor: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """The entries of `tensor` at the given indices of every dimension."""
    for dim, each in enumerate(indices):
        if len(each) != tensor.shape[dim]:
            tensor = tensor.index_select(dim, each.to(tensor.device))
    return tensor


def spread(tensor: Tensor, indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The inverse of `select`: `tensor` at the given indices of every dimension of zeros of shape `sizes`."""
    for dim, (each, count) in enumerate(zip(indices, sizes, strict=True)):
        if len(each) != count:
            whole = tensor.new_zeros([*tensor.shape[:dim], count, *tensor.shape[dim + 1 :]])
            tensor = whole.index_copy_(dim, each.to(tensor.device), tensor)
    return tensor


def loses(dim: Dim, kept: Kept) -> bool:
    """True where some index of `dim` goes."""
    return any(leaf in kept for leaf in leaves(dim))


def kept_indices(dim: Dim, kept: Kept) -> Tensor:
    """Indices of `dim` that stay: those of a product are row-major, those of a concatenation follow each other."""
    indices = torch.zeros(1, dtype=torch.long)
    for axis in flat(dim):
        indices = (indices[:, None] * axis.size + _of_axis(axis, kept)).flatten()
    return indices


def _of_axis(axis: Axis, kept: Kept) -> Tensor:
    if not isinstance(axis.form, Cat):
        return kept[axis] if axis in kept else torch.arange(axis.size)
    starts = torch.tensor([0, *map(size, axis.form.parts)]).cumsum(0).tolist()
    return torch.cat([kept_indices(part, kept) + start for part, start in zip(axis.form.parts, starts, strict=False)])
