"""The only code that changes tensor sizes: selects the kept indices of every tensor and rewrites the sizes beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_prune.graph.attributes import read, rewrite
from hf_prune.graph.dims import Axis, Cat, Dim, flat, leaves, size
from hf_prune.graph.graph import Graph
from hf_prune.graph.sizes import sync_attributes
from hf_prune.graph.trace import tensors_of
from hf_prune.graph.verify import check_model, check_plan, dry_run
from hf_prune.types import Plan, ShapeTable

Kept = Mapping[Axis, Tensor]
"""Axis of a group that loses units -> indices of those that stay."""


def shrink(model: nn.Module, graph: Graph, plan: Plan) -> ShapeTable:
    """Remove the units that `plan` drops from `model`, in place, and return what became narrow.

    Parameters keep their identity (optimizers and ties still hold them); their gradients are dropped. Everything is
    checked before the model is touched: a plan or model that does not fit raises `PruneError`, and so does one whose
    shrunk form would not run.
    """
    check_plan(graph, plan)
    check_model(model, graph)
    kept = {graph.axes[name]: keep.nonzero().flatten().cpu() for name, keep in plan.items() if not keep.all()}
    indices = {
        name: [kept_indices(dim, kept) for dim in shape]
        for name, shape in graph.flow.tensors.items()
        if any(_loses(dim, kept) for dim in shape)
    }
    shapes = {name: tuple(map(len, each)) for name, each in indices.items()}
    table = ShapeTable(shapes, _attributes(model, graph, kept))
    dry_run(model, graph, table)
    tensors = tensors_of(model)
    for name, each in indices.items():
        tensors[name].data = select(tensors[name].data, each)
        tensors[name].grad = None
    rewrite(model, table.attributes)
    for name in {name.rpartition(".")[0] for name in indices}:
        sync_attributes(model.get_submodule(name))
    return table


def select(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """The entries of `tensor` at the given indices of every dimension."""
    for dim, each in enumerate(indices):
        if len(each) != tensor.shape[dim]:
            tensor = tensor.index_select(dim, each.to(tensor.device))
    return tensor


def kept_indices(dim: Dim, kept: Kept) -> Tensor:
    """Indices of `dim` that stay: those of a product are row-major, those of a concatenation follow each other."""
    indices = torch.zeros(1, dtype=torch.long)
    for axis in flat(dim):
        indices = (indices[:, None] * axis.size + _kept_of(axis, kept)).flatten()
    return indices


def _kept_of(axis: Axis, kept: Kept) -> Tensor:
    if not isinstance(axis.form, Cat):
        return kept[axis] if axis in kept else torch.arange(axis.size)
    starts = torch.tensor([0, *map(size, axis.form.parts)]).cumsum(0).tolist()
    return torch.cat([kept_indices(part, kept) + start for part, start in zip(axis.form.parts, starts, strict=False)])


def _loses(dim: Dim, kept: Kept) -> bool:
    return any(leaf in kept for leaf in leaves(dim))


def _attributes(model: nn.Module, graph: Graph, kept: Kept) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """New values of the attributes whose dims lose units."""
    values: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for attribute, dim in graph.flow.equations.attributes.items():
        if not _loses(dim, kept):
            continue
        count, own = len(kept_indices(dim, kept)), values.setdefault(attribute.module, {})
        if attribute.index is None:
            own[attribute.name] = count
        else:
            items = list(own.get(attribute.name) or read(model, attribute.module, attribute.name))
            items[attribute.index] = count
            own[attribute.name] = tuple(items)
    return values
