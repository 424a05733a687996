"""The only code that cuts tensors: selects the kept indices of each, and rewrites the sizes that code keeps."""

from __future__ import annotations

from torch import nn

from hf_prune.graph.fold import fold_constants
from hf_prune.graph.graph import Graph
from hf_prune.graph.kept import Kept, kept_indices, loses, select
from hf_prune.graph.resize import rewrite
from hf_prune.graph.scales import rescale
from hf_prune.graph.sizes import Size, sync_attributes
from hf_prune.graph.table import attribute_holder
from hf_prune.graph.trace import distinct_tensors
from hf_prune.graph.traced_int import Attribute
from hf_prune.graph.verify import check_model, check_plan, check_table, dry_run
from hf_prune.types import Plan, ShapeTable


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
        if any(loses(dim, kept) for dim in shape)
    }
    shapes = {name: tuple(map(len, each)) for name, each in indices.items()}
    table = ShapeTable(shapes, _attributes(model, graph, kept))
    check_table(table)
    ratios = dry_run(model, graph, table, indices)
    fold_constants(model, graph, kept)
    tensors = distinct_tensors(model)
    rescale(tensors, graph.flow.trace, ratios)
    for name, each in indices.items():
        tensors[name].data = select(tensors[name].data, each)
        tensors[name].grad = None
    rewrite(model, table.attributes)
    for name in {name.rpartition(".")[0] for name in indices}:
        sync_attributes(model.get_submodule(name))
    _drop_caches(model)
    return table


def _drop_caches(model: nn.Module) -> None:
    """Begin to train, as a moment when modules drop what they made of their old weights; modes come back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, training in modes:
        module.training = training


def _attributes(model: nn.Module, graph: Graph, kept: Kept) -> dict[str, dict[str, Size]]:
    """New values of the attributes whose dims lose units."""
    values: dict[str, dict[str, Size]] = {}
    for attribute, dim in graph.flow.equations.attributes.items():
        if not loses(dim, kept):
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
