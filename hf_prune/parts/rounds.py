"""Several training runs in a row: what each prunes and trains with, and how zeros of the runs before it stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig
from hf_prune.parts.distillation import DistillConfig
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.selection import Selection
from hf_prune.parts.structures import GroupUnits, element_structures
from hf_prune.types import Plan, PruneError, Structure

Build = Callable[[nn.Module, Any, Any], Recipe]
"""`build` of a method: (model, graph, config) -> recipe."""


@dataclass(frozen=True)
class Round:
    """One training run, with an optimizer and a scheduler of its own, on the model that the run before it left."""

    pruning: PruneConfig
    build: Build
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments in place of the user's."""
    taught: DistillConfig | None = None
    """Distil from the models that this run and all rounds before it started from; None: from the user's teacher."""


def holding_zeros(build: Build) -> Build:
    """`build`, where units that are zero when the round begins stay zero; whole units of groups are gone by then."""

    def held(model: nn.Module, graph: Any, config: Any) -> Recipe:
        recipe = build(model, graph, config)
        if recipe.selection is None:
            raise PruneError(f"method {config.method!r} selects nothing, so zeros of earlier rounds cannot be held.")
        alive = _alive(model, [each for each in recipe.structures if not isinstance(each, GroupUnits)])
        return dataclasses.replace(recipe, selection=_never_again(recipe.selection, alive))

    return held


def _never_again(selection: Selection, alive: Plan) -> Selection:
    """`selection`, for which dead units are the worst, and which does not keep them."""

    def select(scores: Mapping[str, Tensor], share: float) -> Plan:
        worst = {name: _without(score, alive.get(name)) for name, score in scores.items()}
        return {name: keep & alive.get(name, keep).to(keep.device) for name, keep in selection(worst, share).items()}

    return select


def _without(score: Tensor, alive: Tensor | None) -> Tensor:
    return score if alive is None else score.masked_fill(~alive.to(score.device), -torch.inf)


def hold(model: nn.Module, graph: Any, config: PruneConfig) -> Recipe:
    """Prune nothing more; where `config` counted single weights, those that are zero stay zero."""
    thin = config.goal is not None and config.goal.name == "final_sparsity"
    weights = element_structures(prunable_weights(model, config.include, config.exclude)) if thin else []
    alive = _alive(model, weights)
    device = next(model.parameters()).device
    return Recipe(
        structures=weights,
        selection=lambda scores, share: alive,
        schedule=lambda progress: 1.0,
        gates=[MaskGate(each, device) for each in weights],
    )


@torch.no_grad()
def _alive(model: nn.Module, structures: list[Structure]) -> Plan:
    """Units with a weight that is not zero."""
    tensors = dict(model.named_parameters())
    return {
        each.name: torch.stack([each.view(tensors[name], name).ne(0).any(dim=1) for name in each.producers]).any(dim=0)
        for each in structures
    }
