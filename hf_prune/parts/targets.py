"""What methods that rank units prune: single weights for a fraction of weights, whole units of groups for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_goal, require_removal
from hf_prune.parts import structures
from hf_prune.parts.budgets import PRICES, fit_price, normalised
from hf_prune.parts.prunable import prunable_groups, prunable_stacks, prunable_weights
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.selection import Selection, top_k, top_units
from hf_prune.types import Structure

COUNTED = ("target_units", *PRICES)
"""Goals that whole units of groups are counted or priced for."""
LAYERS_COUNTED = tuple(goal for goal in COUNTED if goal != "target_latency")
"""Those of whole layers; the table of latencies knows operations, not layers."""
GOALS = ("final_sparsity", *COUNTED)


def settle_structure(config: PruneConfig, *, layers: bool = False) -> None:
    """Set an empty `config.structure` to what the goal needs.

    layers: whether the method can score whole layers (structure "layer"), too.

    Raises:
        ValueError: no goal, one that removes nothing, or a structure that does not go with it.
    """
    require_goal(config, GOALS)
    assert config.goal is not None
    fitting = ["element"] if config.goal.name == "final_sparsity" else ["group"]
    if layers and config.goal.name in LAYERS_COUNTED:
        fitting.append("layer")
    object.__setattr__(config, "structure", config.structure or fitting[0])
    require_choice("structure", config.structure, ("element", "group", "layer") if layers else ("element", "group"))
    if config.structure not in fitting:
        whole = " or, but for target_latency, whole layers ('layer')" if layers else ""
        raise ValueError(
            f"structure {config.structure!r} does not go with {config.goal.name}: final_sparsity counts single weights "
            f"(structure 'element'), {', '.join(COUNTED)} whole units ('group'){whole}."
        )
    require_removal(config)


def find_targets(
    model: nn.Module, graph: Any, config: PruneConfig, *, normalised_groups: bool = False
) -> tuple[list[Structure], Selection]:
    """The units that `config` names, and the selection that meets its goal with the best of them.

    normalised_groups: also groups and layers under LayerNorm-like statistics, whose shrinking is not exact.
    """
    units: list[Structure]
    if config.structure == "element":
        weights = prunable_weights(model, config.include, config.exclude)
        elements = structures.element_structures(weights)
        assert config.goal is not None
        return elements, top_k(elements, config.goal, scope=config.scope, min_keep=config.min_keep)
    if config.structure == "layer":
        stacks = prunable_stacks(graph.stacks, config.include, config.exclude, normalised_groups)
        units = [structures.layer_structure(stack, model) for stack in stacks]
        return units, choose_units(graph, units, config)
    groups = prunable_groups(model, graph.groups, config.include, config.exclude, normalised_groups)
    units = [structures.group_structure(group, model) for group in groups]
    return units, choose_units(graph, units, config)


def choose_units(graph: Any, units: Sequence[Structure], config: PruneConfig) -> Selection:
    """The selection among whole units that meets the goal, by their number or by price."""
    assert config.goal is not None
    if config.goal.name == "target_units":
        return top_units(units, config.goal, scope=config.scope, min_keep=config.min_keep)
    return fit_price(
        graph.traced,
        units,
        config.goal,
        scope=config.scope,
        min_keep=config.min_keep,
        width_multiple=config.width_multiple,
    )


def sizes(model: nn.Module, units: Sequence[Structure], *, order: int) -> Callable[[], Mapping[str, Tensor]]:
    """Scores by size, comparable over structures: `scores.unit_norms`, of whole units over their structure's mean."""
    norms = unit_norms(model, units, order=order)
    whole = any(each.unit_size > 1 for each in units)
    return (lambda: normalised(norms())) if whole else norms
