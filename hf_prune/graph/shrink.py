"""The only code that cuts tensors: selects the kept indices of each, and rewrites the sizes that code keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_prune.graph.depth import remove_layers
from hf_prune.graph.fold import fold_constants
from hf_prune.graph.graph import Graph
from hf_prune.graph.kept import Kept, kept_axes, kept_entries, kept_indices, loses, select, spread
from hf_prune.graph.resize import Attributes, rewrite
from hf_prune.graph.scales import rescale
from hf_prune.graph.sizes import Size, sync_attributes
from hf_prune.graph.table import attribute_holder, made_buffers
from hf_prune.graph.trace import distinct_tensors
from hf_prune.graph.traced_int import Attribute
from hf_prune.graph.verify import check_model, check_plan, check_table, dry_run
from hf_prune.types import Plan, ShapeTable


def shrink(model: nn.Module, graph: Graph, plan: Plan) -> ShapeTable:
    """Remove the units that `plan` drops from `model`, in place, and return what became narrow.

    Parameters keep their identity (optimizers and ties still hold them); their gradients are dropped. Everything is
    checked before the model is touched: a plan or model that does not fit raises `PruneError`, and so does one whose
    shrunk form would not run. A plan for `graph.stacks` takes whole layers out; it cannot name groups, too.
    """
    if graph.names_layers(plan):
        check_model(model, graph)
        remove_layers(model, graph.inputs, graph.stacks, plan)
        return ShapeTable()
    check_plan(graph, plan)
    check_model(model, graph)
    kept, indices = kept_axes(graph, plan), kept_entries(graph, plan)
    made = made_buffers(model)
    shapes = {name: tuple(map(len, each)) for name, each in indices.items() if name not in made}
    buffers = {name: tuple(indices[name][0].tolist()) for name in made if name in indices}
    table = ShapeTable(shapes, _attributes(model, graph, kept, kept), buffers)
    check_table(table)
    ratios = dry_run(model, graph, table, indices)
    fold_constants(model, graph, kept)
    rescale(distinct_tensors(model), graph.flow.trace, ratios)
    _cut(model, indices, table.attributes)
    return table


def narrow(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """The cut of `shrink(model, graph, plan)` alone: nothing is checked, folded or rescaled."""
    kept, indices = kept_axes(graph, plan), kept_entries(graph, plan)
    _cut(model, indices, _attributes(model, graph, kept, kept))


def _cut(model: nn.Module, indices: Mapping[str, Sequence[Tensor]], attributes: Attributes) -> None:
    tensors = distinct_tensors(model)
    for name, each in indices.items():
        _replace(tensors[name], select(tensors[name].data, each))
    _adapt(model, indices, attributes)


def widen(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Undo `narrow(model, graph, plan)` in place: the sizes that `graph` knows, with zeros where units are gone."""
    indices, tensors = kept_entries(graph, plan), distinct_tensors(model)
    for name, each in indices.items():
        _replace(tensors[name], spread(tensors[name].data, each, graph.flow.tensors[name].sizes))
    _adapt(model, indices, _attributes(model, graph, kept_axes(graph, plan), {}))


def _adapt(model: nn.Module, changed: Iterable[str], attributes: Attributes) -> None:
    """Have the sizes that modules keep agree with their tensors, of which those in `changed` have new shapes."""
    rewrite(model, attributes)
    for name in {name.rpartition(".")[0] for name in changed}:
        sync_attributes(model.get_submodule(name))
    _drop_caches(model)


def _replace(tensor: Tensor, data: Tensor) -> None:
    """Give `tensor` other data of another shape; it stays the same object."""
    tensor.grad = None
    # While a loss of the last step lives, autograd remembers the old shape and would refuse the next gradient. It
    # forgets the shape where the type changes.
    tensor.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    tensor.data = data


def _drop_caches(model: nn.Module) -> None:
    """Begin to train, as a moment when modules drop what they made of their old weights; modes come back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, training in modes:
        module.training = training


def _attributes(model: nn.Module, graph: Graph, cut: Kept, kept: Kept) -> dict[str, dict[str, Size]]:
    """Values, where `kept` stays, of the attributes whose dims lose units in `cut`."""
    values: dict[str, dict[str, Size]] = {}
    for attribute, dim in graph.flow.equations.attributes.items():
        if not loses(dim, cut):
            continue
        count, own = len(kept_indices(dim, kept)), values.setdefault(attribute.module, {})
        if attribute.index is None:
            own[attribute.name] = count
        else:
            holder, name = attribute_holder(model.get_submodule(attribute.module), attribute.name)
            items = list(own.get(attribute.name, getattr(holder, name)))
            items[attribute.index] = count
            own[attribute.name] = tuple(items)
    _keep_apart(values, graph)
    return values


def _keep_apart(values: dict[str, dict[str, Size]], graph: Graph) -> None:
    """Where code asks whether two attributes differ, keep one that is used for nothing else different and in order.

    Such an attribute is the size of something whose new size it does not tell, and might meet the other by chance.
    """
    for pair in graph.flow.trace.uses.unequal:
        for idle, other in (pair, pair[::-1]):
            if not (isinstance(idle, Attribute) and isinstance(other, Attribute)) or idle.index is not None:
                continue
            met = values.get(other.module, {}).get(other.name) == idle.value
            if met and idle not in graph.flow.equations.attributes:
                step = 1 if idle.value > other.value else -1
                values.setdefault(idle.module, {})[idle.name] = idle.value + step
