"""Checks around shrinking: that plan and model fit before it, that the result runs, that it computes the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import zip_longest
from math import isclose

import torch
from torch import Tensor, nn

from hf_prune.graph.attributes import preserved
from hf_prune.graph.flow import FOLLOWED
from hf_prune.graph.graph import Graph, trace
from hf_prune.graph.groups import unit_indices
from hf_prune.graph.kept import select
from hf_prune.graph.resize import rewrite
from hf_prune.graph.rules import name_of, view
from hf_prune.graph.scales import Scale, constant, floats
from hf_prune.graph.trace import Inputs, Operation, Trace, call, distinct_tensors, record_on
from hf_prune.types import Group, Plan, PruneError, ShapeTable

LAYOUT = {*view.RULES, *FOLLOWED, "slice", "select", "getitem"}
"""Operations that only arrange values: whether they are needed may depend on sizes (a repetition by 1 is none)."""


def check_plan(graph: Graph, plan: Plan) -> None:
    """Raise unless every name, dtype and shape of `plan` fits a group and no group is emptied."""
    for name, keep in plan.items():
        group = graph.groups.get(name)
        if group is None:
            close = get_close_matches(name, graph.groups, n=3) or sorted(graph.groups)[:3]
            why = f"it is frozen: {graph.frozen[name].frozen}" if name in graph.frozen else f"closest: {close}"
            raise PruneError(f"the plan names group {name!r}, which cannot be pruned; {why}. See graph.groups.")
        if keep.dtype != torch.bool or tuple(keep.shape) != (group.size,):
            raise PruneError(
                f"plan[{name!r}] must be a bool tensor of shape ({group.size},) with True for units that stay, got "
                f"{keep.dtype} of shape {tuple(keep.shape)}."
            )
        if not keep.any():
            raise PruneError(
                f"group {name!r} has {group.size} units, the plan keeps 0. Every group must keep at least 1; lower the "
                "sparsity or set min_keep."
            )


def check_model(model: nn.Module, graph: Graph) -> None:
    """Raise unless `model` still has the tensors that `graph` was traced with and no hooks hang on its modules."""
    tensors = distinct_tensors(model)
    for name, shape in graph.flow.tensors.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape.sizes:
            raise PruneError(
                f"tensor {name!r} had shape {shape.sizes} when the graph was traced, now it is "
                f"{found or 'gone'}. Trace the model again and make the plan from the new graph."
            )
    for path, module in model.named_modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            raise PruneError(
                f"module {path!r} has hooks, which may rely on the old sizes. Remove them before shrinking and "
                "register them again afterwards."
            )
    hooked = [name for name, tensor in tensors.items() if tensor._backward_hooks]
    if hooked:
        raise PruneError(
            f"tensor {hooked[0]!r} has a gradient hook, which may rely on the old size. Remove it before shrinking and "
            "register it again afterwards."
        )


def check_table(table: ShapeTable) -> None:
    """Raise where a tensor that is to be cut belongs to a parametrization."""
    for name in table.shapes:
        path, found, rest = name.partition(".parametrizations.")
        if found:
            raise PruneError(
                f"{path}.{rest.partition('.')[0]} has a parametrization, which would keep its old size. Fold it first "
                "(torch.nn.utils.parametrize.remove_parametrizations)."
            )


def dry_run(
    model: nn.Module, graph: Graph, table: ShapeTable, indices: Mapping[str, Sequence[Tensor]]
) -> dict[Scale, float]:
    """Raise unless `model` would run with the sizes of `table`, and compute the same; the model stays as it is.

    `indices` are those that stay of each tensor in `table`. Returns by how much each attention scale shrinks (old
    factor over new), where it follows a size.
    """
    before = graph.flow.trace
    shapes = {name: tuple(map(len, each)) for name, each in indices.items()}
    tensors = {
        name: select(tensor.detach(), indices.get(name, ()))
        if before.real
        else torch.empty(shapes.get(name, tensor.shape), dtype=tensor.dtype, device="meta")
        for name, tensor in distinct_tensors(model).items()
    }
    try:
        with preserved(model):
            rewrite(model, table.attributes)
            after = record_on(model, tensors, graph.inputs, before.real)
    except Exception as error:
        raise PruneError(
            f"{type(model).__name__} would not run at the sizes of this plan: {type(error).__name__}: {error}. The "
            "model is unchanged. Leave out the groups of the module that failed; attributes that would have changed: "
            f"{dict(table.attributes)}."
        ) from error
    ratios: dict[Scale, float] = {}
    for old, new in _pairs(before, after):
        scale = graph.flow.scales.get(old)
        if old is None or new is None or old.target != new.target or not (scale or floats(old) == floats(new)):
            raise PruneError(
                f"{type(model).__name__} would compute something else at the sizes of this plan: "
                f"{old and old.format_node()} becomes {new and new.format_node()}. The model is unchanged. Leave out "
                "the groups of the module that does it."
            )
        if scale:
            ratios[scale] = constant(old) / constant(new)
    _check_shared(ratios, model)
    return {scale: ratio for scale, ratio in ratios.items() if ratio != 1.0}


def _pairs(before: Trace, after: Trace) -> list[tuple[Operation, Operation]]:
    """Old and new operations, in order.

    A run on real values may do some work more or less often, as experts that no token chose do none: then each new
    operation goes with an old one of its kind.
    """
    old, new = list(_operations(before)), list(_operations(after))
    if not before.real or [each.target for each in old] == [each.target for each in new]:
        return list(zip_longest(old, new))
    kinds = {(each.target, *floats(each)): each for each in old}
    return [(kinds.get((each.target, *floats(each))), each) for each in new]


def _operations(trace: Trace) -> Iterator[Operation]:
    """The operations that compute; how tensors are laid out may depend on sizes."""
    return (node for node in trace.graph.nodes if node.op == "call_function" and name_of(node.target) not in LAYOUT)


def _check_shared(ratios: Mapping[Scale, float], model: nn.Module) -> None:
    """Raise where two scales would have one weight take over different ratios."""
    shared: dict[tuple[Operation, tuple[int, ...]], float] = {}
    for scale, ratio in ratios.items():
        if not isclose(shared.setdefault((scale.weight, scale.rows), ratio), ratio):
            raise PruneError(
                f"{type(model).__name__} uses one query weight at two attention scales, which this plan changes "
                "differently. The model is unchanged. Keep equal counts in the head_width groups of these layers."
            )


@torch.no_grad()
def check_exactness(model: nn.Module, inputs: Inputs, plan: Plan) -> float:
    """Largest difference between `model` with the dropped units set to zero and `model` shrunk, on `inputs`.

    Works on copies in evaluation mode. Groups marked `normalised` are not exact.
    """
    from hf_prune.graph.shrink import shrink  # shrink itself is checked by this module

    masked = copy.deepcopy(model).eval()
    graph = trace(masked, inputs)
    mask(masked, graph, plan)
    # The masked copy is what is shrunk: from the model itself, shrink would keep what dead units still emit.
    shrunk = copy.deepcopy(masked)
    shrink(shrunk, graph, plan)
    wanted, found = (call(each, distinct_tensors(each), inputs) for each in (masked, shrunk))
    return max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))


def random_plan(groups: Iterable[Group], seed: int = 7, low: float = 0.1, high: float = 0.6) -> Plan:
    """Random units removed, between `low` and `high` of each group, another share of each: equal ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    plan = {}
    for group in groups:
        ratio = low + (high - low) * torch.rand((), generator=generator).item()
        plan[group.name] = random_keep(group.size, max(1, round(group.size * (1 - ratio))), generator)
    return plan


def random_keep(units: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `units` True, shape `(units,)`."""
    keep = torch.zeros(units, dtype=torch.bool)
    keep[torch.randperm(units, generator=generator)[:count]] = True
    return keep


@torch.no_grad()
def mask(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Set every entry of a dropped unit to zero, where it is written and where it is read."""
    tensors = distinct_tensors(model)
    for name, keep in plan.items():
        for member in graph.groups[name].members:
            dropped = unit_indices(member, len(keep))[~keep.cpu()].flatten()
            tensors[member.tensor].index_fill_(member.dim, dropped.to(tensors[member.tensor].device), 0)
