"""Which indices of a dimension stay when units of its axes go, and the tensors that these make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.graph.axes import Axis, Cat, Dim, flat, leaves, size

Kept = Mapping[Axis, Tensor]
"""Axis that loses units -> indices of those that stay."""


def select(tensor: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """The entries of `tensor` at the given indices of every dimension."""
    for dim, each in enumerate(indices):
        if len(each) != tensor.shape[dim]:
            tensor = tensor.index_select(dim, each.to(tensor.device))
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
