"""Annealing and direct sparsity control, DSC (Guo, She & Barbu 2020, arXiv 2002.04301).

Idea      how many units are left is set directly, without a penalty that would shrink those that stay: after every
          stretch of training the smallest go, many at first and fewer and fewer later, until the goal is reached
          half-way. So the model gets cheaper early, and its support is at rest for the second half.
Equations M_e = k + (M - k) max(0, (N1 - e) / (N1 + mu e)), Barbu et al. 2017 -> `schedules.annealed`; the worth of a
          channel is |gamma| of its batch norm -> `_norm_scales`, of an input column its norm, of a weight |w|.
Differs   Only the abstract and two implementations of the method it grew from (feature selection with annealing) could
          be had; norm scales as scores, and one ranking for each layer (`scope="per_group"`) or for all are from
          memory of the paper. Keeping equally many weights in each output row is not offered. A channel of several
          batch norms, as in a residual stream, is worth the root mean square of their scales; units without one
          (heads, neurons) the product of the norms of what writes and what reads them, and where a model has both
          kinds, each width's scores are divided by their mean. |gamma| says nothing about the weights that read the
          channel. A channel goes with its offset beta: what it added as a constant is lost, and training adapts.
          Masked at every event, cut out of the model at `cuts` of them: each cut costs a trace.
Related   `magnitude` follows a cubic schedule, takes units back and ranks channels by their filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.graph.writers import NORMS
from hf_prune.parts import schedules, structures, targets
from hf_prune.parts.budgets import normalised
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import dense_parameter, unit_norms
from hf_prune.parts.selection import Selection, select_among, top_k
from hf_prune.types import Paper, Plan, Structure

PAPER = Paper(
    title="Network Pruning via Annealing and Direct Sparsity Control",
    authors="Yangzi Guo, Yiyuan She, Adrian Barbu",
    year=2020,
    arxiv="2002.04301",
    status="reconstruction",
    bibtex="""@article{guo2020network,
  title   = {Network Pruning via Annealing and Direct Sparsity Control},
  author  = {Guo, Yangzi and She, Yiyuan and Barbu, Adrian},
  journal = {arXiv preprint arXiv:2002.04301},
  year    = {2020}
}""",
)
NEEDS_TRAINING = True
GOALS = targets.GOALS
TINY_MODEL = "image"


@dataclass(frozen=True)
class AnnealingConfig(PruneConfig):
    """`mu` of 0 to 1 for a model that starts from random weights: size says little about those yet."""

    method = "annealing"
    rounds_widths = True

    structure: str = ""  # "element", "column" (all weights of an input), "group"; empty: what the goal needs
    scope: str = "per_group"
    end: float = 0.5  # share of the optimizer steps at which the goal is reached (N1)
    mu: float = 5.0  # how much sooner most units go; 0: equally many at each event
    events: int = 50  # how often the smallest units go between `begin` and `end`
    cuts: int = 5  # at how many of these points, evenly spread, whole units are cut out of the model
    normalised_groups: bool = False  # also prune groups under LayerNorm-like statistics, which is not exact

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("", "element", "column", "group"))
        if self.structure != "column":
            targets.settle_structure(self)
        elif self.goal is None or self.goal.name != "final_sparsity":
            raise ValueError("structure 'column' counts weights: AnnealingConfig needs final_sparsity with it.")
        require_range("mu", self.mu, 0.0, math.inf, closed_right=False)
        for name in ("events", "cuts"):
            require_range(name, getattr(self, name), 1, math.inf, closed_right=False)


Config = AnnealingConfig


class Annealing:
    """Selection: fewer units at every event, each time the best of those that are left."""

    def __init__(self, gates: Sequence[MaskGate], selection: Selection) -> None:
        self.gates, self.selection = gates, selection
        self.share: float | None = None

    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """Units that stay; between two events, those of the last one."""
        plan = {gate.name: gate.keep().clone() for gate in self.gates}
        again, self.share = self.share == share, share
        return plan if again else select_among(plan, self.selection, scores, share)


def _columns(model: nn.Module, config: AnnealingConfig) -> tuple[list[Structure], Selection]:
    weights = prunable_weights(model, config.include, config.exclude)
    units = structures.column_structures(weights)
    assert config.goal is not None
    return units, top_k(units, config.goal, scope=config.scope, min_keep=config.min_keep)


def channel_scores(model: nn.Module, units: Sequence[Structure]) -> Callable[[], Mapping[str, Tensor]]:
    """|gamma| of every unit's batch norm; of units without one, the size of what writes them times what reads them."""
    scales = {each.name: _norm_scales(model, each) for each in units}
    comparable = all(scales.values())

    @torch.no_grad()
    def scores() -> Mapping[str, Tensor]:
        found = {
            each.name: _root_mean_square(model, each, scales[each.name]) if scales[each.name] else _through(model, each)
            for each in units
        }
        return found if comparable else normalised(found)

    return scores


def _norm_scales(model: nn.Module, structure: Structure) -> list[str]:
    """Names of the batch norm scales among what writes the units."""
    return [
        name
        for name in structure.producers
        if name.endswith(".weight") and isinstance(model.get_submodule(name.rpartition(".")[0]), NORMS)
    ]


def _root_mean_square(model: nn.Module, structure: Structure, tensors: Sequence[str]) -> Tensor:
    views = [structure.view(dense_parameter(model, name).float(), name) for name in tensors]
    return torch.cat(views, dim=1).square().mean(dim=1).sqrt()


def _through(model: nn.Module, structure: Structure) -> Tensor:
    """Norm of the weights that write each unit, times that of those that read it."""
    matrices = [name for name in structure.tensors if dense_parameter(model, name).ndim > 1]
    sides = (
        [name for name in matrices if name in structure.producers],
        [name for name in matrices if name not in structure.producers],
    )
    into, out = (_root_mean_square(model, structure, side) if side else None for side in sides)
    assert into is not None
    return into if out is None else into * out


def build(model: nn.Module, graph: Any, config: AnnealingConfig) -> Recipe:
    """Masks that drop more at every event; whole units are cut out at some of them."""
    if config.structure == "column":
        units, selection = _columns(model, config)
    else:
        units, selection = targets.find_targets(model, graph, config, normalised_groups=config.normalised_groups)
    whole = config.structure == "group"
    gates = [MaskGate(each, next(model.parameters()).device) for each in units]
    last = [config.begin + (config.end - config.begin) * (i + 1) / config.cuts for i in range(config.cuts)]
    return Recipe(
        structures=units,
        scores=channel_scores(model, units) if whole else unit_norms(model, units, order=2),
        selection=Annealing(gates, selection).select,
        schedule=schedules.annealed(config.mu, config.begin, config.end, config.events),
        fixed_from=config.end,
        shrink_at=last if whole else (),
        gates=gates,
    )


TINY = {
    "element": AnnealingConfig(final_sparsity=0.6, begin=0.1, events=4),
    "column": AnnealingConfig(final_sparsity=0.5, structure="column", events=4),
    "units": AnnealingConfig(target_units=0.5, events=4, cuts=2),
    "flops": AnnealingConfig(target_flops=0.5, scope="global", events=4, cuts=2, mu=1.0),
}
