"""The finished model of a run: gates folded, units cut out, the cut noted in its config, and a report of it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import nn
from transformers import PreTrainedModel

from hf_prune.checkpoint import mark
from hf_prune.checkpoint.save import earlier_table
from hf_prune.config import PruneConfig
from hf_prune.graph import shrink
from hf_prune.graph.lazy import LazyGraph
from hf_prune.graph.verify import check_model
from hf_prune.narrowing import Narrowing
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.structures import GroupUnits, LayerUnits
from hf_prune.report import make_report
from hf_prune.report.origin import base_model
from hf_prune.types import Paper, Plan, Report, Structure

_CUT = (GroupUnits, LayerUnits)
"""Structures whose units are cut out of the model in the end; those of others stay as zeros."""


def units_to_cut(structures: Sequence[Structure], plan: Plan) -> Plan:
    """The part of `plan` that is about units of groups or whole layers: what makes the model smaller."""
    return {each.name: plan[each.name] for each in structures if isinstance(each, _CUT)}


def prices(graph: LazyGraph, cut: Plan) -> dict[str, dict[str, float]]:
    """`Report.prices` of a plan over groups; none without groups, so that a method on weights needs no trace."""
    if not cut:
        return {}
    dense, kept = asdict(graph.traced.price()), asdict(graph.traced.price(cut))
    return {name: {"dense": dense[name], "kept": kept[name]} for name in dense}


def refuse_unshrinkable(model: nn.Module, graph: LazyGraph, structures: Sequence[Structure]) -> None:
    """Raise now for what would stop `bake` at the end, whatever the plan: hooks, another tool's quantization."""
    if any(isinstance(each, _CUT) for each in structures):
        check_model(model, graph.traced)
        if isinstance(model, PreTrainedModel):
            earlier_table(model)


def bake(
    model: nn.Module,
    recipe: Recipe,
    graph: LazyGraph,
    narrowing: Narrowing | None,
    config: PruneConfig,
    paper: Paper,
) -> Report:
    """Make `model`, which holds the gates of `recipe`, a plain one without the units that they drop.

    The cut is noted in the config, so that any save of the model can be loaded.

    Raises:
        PruneError: the model cannot be cut.
    """
    plan = {gate.name: gate.keep().clone() for gate in recipe.gates}
    was_training = model.training
    model.eval()  # gates that are random while training fold their deterministic value
    try:
        for gate in recipe.gates:
            gate.fold(model)
    finally:
        model.train(was_training)
    if narrowing is not None:
        narrowing.finish(model)
    cut = units_to_cut(recipe.structures, plan)
    report = replace(
        make_report(recipe.structures, plan, config, paper, model, graph.frozen if cut else {}),
        run=dict(recipe.record()) if recipe.record is not None else {},
        prices=prices(graph, cut),
        base_model=base_model(model),
    )
    if cut:
        table = shrink(model, graph.traced, cut)
        if isinstance(model, PreTrainedModel):
            mark(model, table)
    return report
