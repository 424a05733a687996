"""Removing units without changing the output: dead units, and constants that move into the bias of their readers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_prune.graph.constants import Constants, Layer
from hf_prune.graph.graph import Graph
from hf_prune.graph.groups import unit_indices
from hf_prune.graph.kept import Kept, kept_indices
from hf_prune.graph.rules.contract import SUMMED
from hf_prune.graph.trace import distinct_tensors
from hf_prune.types import Group, Plan


@torch.no_grad()
def fold_constants(model: nn.Module, graph: Graph, kept: Kept) -> None:
    """Add what the units that go emit to the biases of the layers that read them, in place.

    Without a bias, the mean of a batch norm behind the layer takes it. A constant that cannot be folded, because its
    reader has neither or pads with zeros, is lost with a warning.
    """
    tensors = distinct_tensors(model)
    if any(tensor.is_meta for tensor in tensors.values()):  # sizes only, nothing to move
        return
    constants, lost = Constants(model, graph), []
    for layer in constants.layers:
        values = constants.read_by(layer)
        if values is None:
            continue
        emitted = values.nan_to_num(0.0)
        emitted[kept_indices(constants.read_dim(layer), kept).to(emitted.device)] = 0.0
        if not emitted.any():
            continue
        if not _foldable(layer):
            lost.append(layer.weight)
        elif layer.bias is not None:
            tensors[layer.bias] += _shift(layer, tensors[layer.weight], emitted)
        elif layer.mean is not None:
            tensors[layer.mean] -= _shift(layer, tensors[layer.weight], emitted)
    if lost:
        warnings.warn(
            f"removed units emit constants that {', '.join(lost)} cannot take over (no bias, groups, or padding with "
            "zeros): the output changes. Set what these units add (biases, norm offsets) to zero too, or fine-tune.",
            stacklevel=3,
        )


@torch.no_grad()
def dead_units(model: nn.Module, graph: Graph) -> Plan:
    """Units whose removal changes nothing: no weight reads them, or what they emit is constant and can be folded.

    Covers the groups that `shrink` treats exactly and that only weights sum over. A group whose units are all dead
    keeps its first one.
    """
    constants, tensors = Constants(model, graph), distinct_tensors(model)
    plan: Plan = {}
    for name, group in graph.groups.items():
        if group.normalised or SUMMED in graph.axes[name].marks:
            continue
        dead = _constant(group, constants) | _unread(group, tensors)
        if dead.any():
            dead[0] &= not dead.all()
            plan[name] = ~dead
    return plan


def _unread(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Units whose columns are zero in every weight that reads them."""
    readers = [member for member in group.members if member.reads]
    if not readers:
        return torch.zeros(group.size, dtype=torch.bool)
    used = [_units(tensors[m.tensor] != 0, m.dim, unit_indices(m, group.size)).any(1) for m in readers]
    return ~torch.stack(used).any(0).cpu()


def _constant(group: Group, constants: Constants) -> Tensor:
    """Units that every reader sees as a constant that it can fold."""
    readers = [member for member in group.members if member.reads]
    known = []
    for member in readers:
        layers = [layer for layer in constants.layers if layer.weight == member.tensor]
        values = [constants.read_by(layer) for layer in layers]
        for layer, each in zip(layers, values, strict=True):
            if each is not None:
                fine = each.isfinite() if _foldable(layer) else each == 0
                known.append(fine[unit_indices(member, group.size)].all(1).cpu())
        if not layers or any(each is None for each in values):
            return torch.zeros(group.size, dtype=torch.bool)
    return torch.stack(known).all(0) if known else torch.zeros(group.size, dtype=torch.bool)


def _units(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """`tensor` regrouped as `(units, elements)`."""
    rows = tensor.movedim(dim, 0)[indices.flatten().to(tensor.device)]
    return rows.reshape(len(indices), -1)


def _foldable(layer: Layer) -> bool:
    return (layer.bias or layer.mean) is not None and not layer.padded and not layer.grouped


def _shift(layer: Layer, weight: Tensor, emitted: Tensor) -> Tensor:
    """What the constants `emitted`, shape `(inputs,)`, add to every output of `layer`."""
    columns = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    return (columns if layer.reads else columns.T) @ emitted
