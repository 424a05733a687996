"""Several training runs in a row: what each prunes and trains with, and how zeros of the runs before it stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_prune.config import PruneConfig
from hf_prune.parts.distillation import DistillConfig
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.selection import select_among
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
        alive = _alive(model, recipe.structures)
        return dataclasses.replace(recipe, selection=partial(select_among, alive, recipe.selection))

    return held


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
def _alive(model: nn.Module, structures: Sequence[Structure]) -> Plan:
    """Units with a weight that is not zero; all of a group, which has lost the others."""
    tensors, alive = dict(model.named_parameters()), {}
    for each in structures:
        views = [each.view(tensors[name], name).ne(0).any(dim=1) for name in each.producers]
        whole = isinstance(each, GroupUnits)
        alive[each.name] = torch.ones_like(views[0]) if whole else torch.stack(views).any(dim=0)
    return alive
