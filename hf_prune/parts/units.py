"""Single weights or units of groups, as the goal has it: what methods share that differ in their scores alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_prune.config import PruneConfig, require_choice
from hf_prune.parts.budgets import PRICES, fit_price
from hf_prune.parts.prunable import prunable_groups, prunable_weights
from hf_prune.parts.selection import Selection, top_k
from hf_prune.parts.structures import element_structures, group_structure
from hf_prune.types import Structure

UNIT_GOALS = ("final_sparsity", *PRICES)


@dataclass(frozen=True)
class UnitsConfig(PruneConfig):
    """`final_sparsity` removes single weights, `target_*` removes whole units of dimension groups."""

    structure: str = ""  # "element" (single weights) or "group" (whole units); empty: what the goal needs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goal is None or self.goal.name not in UNIT_GOALS:
            raise ValueError(f"{type(self).__name__} needs one goal of {', '.join(UNIT_GOALS)}.")
        needed = "element" if self.goal.name == "final_sparsity" else "group"
        object.__setattr__(self, "structure", self.structure or needed)
        require_choice("structure", self.structure, ("element", "group"))
        if self.structure != needed:
            raise ValueError(
                f"structure {self.structure!r} does not go with {self.goal.name}: final_sparsity counts single weights "
                f"(structure 'element'), {', '.join(PRICES)} price whole units ('group')."
            )
        if self.goal.kept(1.0) == 1.0:
            raise ValueError(f"{self.goal.name}={self.goal.value} removes nothing.")


def choose_units(
    model: nn.Module, graph: Any, config: UnitsConfig, normalised: bool = False
) -> tuple[list[Structure], Selection]:
    """What can be removed, and the selection that meets the goal.

    normalised: also groups under LayerNorm-like statistics.
    """
    assert config.goal is not None
    if config.structure == "element":
        units = element_structures(prunable_weights(model, config.include, config.exclude))
        return units, top_k(units, config.goal, scope=config.scope, min_keep=config.min_keep)
    groups = prunable_groups(model, graph.groups, config.include, config.exclude, normalised)
    bound: list[Structure] = [group_structure(group, model) for group in groups]
    return bound, fit_price(graph.traced, bound, config.goal, scope=config.scope, min_keep=config.min_keep)
