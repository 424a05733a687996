"""Lookahead: a weight counts by what its loss does to the layers around it (Park et al. 2020, arXiv 2002.04809).

Idea      zeroing one weight of W_l changes the product W_{l+1} W_l W_{l-1} by a matrix of rank one, whose norm needs no
          data. Unlike magnitude it ranks alike when a layer is scaled up and the next one down.
Equations score = w^2 * ||row j of W_{l-1}||^2 * ||column i of W_{l+1}||^2, times (gamma / sigma)^2 of norms between
          the layers -> `score`, `parts.energies`; forward, backward and split removal -> `Lookahead.select`; score over
          its layer's L2 norm in one ranking -> `_over_norm`; activation rates -> `Lookahead.measure`.
Differs   Read from the authors' code, not the paper's text. Neighbours come from the graph: they use module order and
          ignore skips, shortcuts' norms and the two axes of a flattened map. A residual stream is factor 1 beside the
          scale of a norm in front of the reader; `streams="writers"` sums over all that add into it. Queries are
          neighbours of keys, values of the output projection; depthwise kernels are scales. Fused projections and
          grouped convolutions have factor 1 where it cannot be told which part is meant. An activation rate is the mean
          over positions where they sum (same ranking within a layer), and weighs the two sides of the scored weight,
          not the far rows of its reader. A unit of a group has the sum over its producers' weights, without W_{l-1}:
          the exact change of a linear pair. Weights removed before are not taken back.
Related   `magnitude` has both factors 1; `weight_importance` is as invariant and reads data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.graph.neighbours import Neighbours
from hf_prune.parts import schedules, statistics, targets
from hf_prune.parts.budgets import normalised
from hf_prune.parts.energies import Energies
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import dense_parameter
from hf_prune.parts.selection import Selection, select_among
from hf_prune.parts.statistics import Calibration, Point, gather
from hf_prune.types import Paper, Plan, Structure

PAPER = Paper(
    title="Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning",
    authors="Sejun Park, Jaeho Lee, Sangwoo Mo, Jinwoo Shin",
    year=2020,
    arxiv="2002.04809",
    status="reconstruction",
    bibtex="""@inproceedings{park2020lookahead,
  title     = {Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning},
  author    = {Park, Sejun and Lee, Jaeho and Mo, Sangwoo and Shin, Jinwoo},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}""",
)
NEEDS_TRAINING = False
GOALS = targets.GOALS


@dataclass(frozen=True)
class LookaheadConfig(PruneConfig):
    """Defaults are the paper's LAP: the same fraction of each layer, all scored before any is masked."""

    method = "lookahead"
    rounds_widths = True

    structure: str = ""  # "element" (single weights) or "group" (whole units); empty: what the goal needs
    scope: str = "per_group"
    order: str = "together"  # "forward" or "backward": each layer is masked before the next one is scored
    splits: int = 1  # sub-steps of every removal, with new scores in between
    rounds: int = 1  # removals between begin and end of a training run
    activations: bool = False  # weigh channels by how often they are above zero on data (LAP-act)
    calibration_batches: int = 16  # batches that activation rates are counted on
    streams: str = "one"  # factor of a residual stream: "one", or the energy of all "writers" that add into it

    def __post_init__(self) -> None:
        super().__post_init__()
        targets.settle_structure(self)
        require_choice("order", self.order, ("together", "forward", "backward"))
        require_choice("streams", self.streams, ("one", "writers"))
        for name in ("splits", "rounds", "calibration_batches"):
            require_range(name, getattr(self, name), 1, float("inf"), closed_right=False)
        if self.order != "together" and (self.structure != "element" or self.scope != "per_group"):
            raise ValueError(
                f"order={self.order!r} masks layer by layer, which needs final_sparsity and scope='per_group'; got "
                f"structure={self.structure!r}, scope={self.scope!r}."
            )


Config = LookaheadConfig


class Lookahead:
    """Scores and removes, in the order that the config says."""

    def __init__(
        self, model: nn.Module, graph: Any, units: Sequence[Structure], selection: Selection, config: LookaheadConfig
    ) -> None:
        self.model, self.units, self.selection, self.config = model, units, selection, config
        self.neighbours = Neighbours(graph.traced, through_streams=config.streams == "writers")
        self.gates = [MaskGate(each, next(model.parameters()).device) for each in units]
        self.rates: dict[str, Tensor] = {}

    def measure(self, calibration: Calibration) -> dict[str, Tensor]:
        """Count how often what a layer takes in from another is above zero, if asked to; scores follow in `select`."""
        if self.config.activations:
            fed = {edge.reader for edge in self.neighbours.edges if edge.writer is not None and not edge.product}
            weights = [self.neighbours.layers[number].weight for number in sorted(fed)]
            points = {name: Point(name.rpartition(".")[0], statistics.active, taken_in=True) for name in weights}
            self.rates = gather(self.model, calibration.batches(self.config.calibration_batches), points)
        return {}

    @torch.no_grad()
    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """Go from the last round's share to `share` in `splits` steps; what is gone stays gone."""
        plan = {gate.name: gate.keep() for gate in self.gates}
        before = max(share - 1.0 / self.config.rounds, 0.0)
        for split in range(self.config.splits):
            reached = before + (share - before) * (split + 1) / self.config.splits
            for block in self._blocks():
                plan.update(select_among(plan, self.selection, self.scores(plan, block), reached))
        return plan

    def _blocks(self) -> list[list[Structure]]:
        """What is scored before any of it is masked."""
        if self.config.order == "together":
            return [list(self.units)]
        runs = [layer.weight for layer in self.neighbours.layers]
        ordered = sorted(self.units, key=lambda each: runs.index(each.name) if each.name in runs else len(runs))
        return [[each] for each in (ordered if self.config.order == "forward" else reversed(ordered))]

    def scores(self, plan: Plan, units: Sequence[Structure]) -> dict[str, Tensor]:
        """Of `units`, with everything that `plan` drops at zero."""
        energies = Energies(self.neighbours, self._weights(plan), self.rates)
        if self.config.structure == "element":
            found = {each.name: score(each.name, energies).flatten() for each in units}
            return _over_norm(found) if self.config.scope == "global" else found
        found = {each.name: _of_units(each, energies) for each in units}
        return normalised(found) if self.config.scope == "global" else found

    def _weights(self, plan: Plan) -> dict[str, Tensor]:
        """Copies of the model's tensors, masked."""
        names = {layer.weight for layer in self.neighbours.layers}
        names |= {
            each for edge in self.neighbours.edges for d in edge.diagonals for each in (d.tensor, d.variance) if each
        }
        weights = {}
        for name in names:
            weight = dense_parameter(self.model, name).detach()
            weights[name] = weight.to(statistics.widest(weight.device))
        for each in self.units:
            for name in weights.keys() & set(each.tensors):
                weights[name] = torch.where(each.expand(plan[each.name], name), weights[name], 0.0)
        return weights


def score(weight: str, energies: Energies, *, before: bool = True) -> Tensor:
    """`w^2`, times the energies before and after it, in the weight's shape; summed over the uses of a shared weight.

    before: False leaves the layers before it out.
    """
    uses = [number for number, layer in enumerate(energies.neighbours.layers) if layer.weight == weight]
    factors = [energies.after(use) * (energies.before(use) if before else 1.0) for use in uses]
    return energies.weights[weight].square() * (reduce(torch.add, factors) if factors else 1.0)


def _of_units(structure: Structure, energies: Energies) -> Tensor:
    """`||row of A||^2 * ||column of B||^2` of each unit between layers A and B, `(units,)`."""
    matrices = [name for name in structure.producers if name in energies.weights and energies.weights[name].ndim > 1]
    return torch.stack([structure.view(score(name, energies, before=False), name).sum(1) for name in matrices]).sum(0)


def _over_norm(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: score / score.norm().clamp(min=torch.finfo(score.dtype).tiny) for name, score in scores.items()}


def build(model: nn.Module, graph: Any, config: LookaheadConfig) -> Recipe:
    """Masks that follow the scores at each rise of the schedule."""
    units, selection = targets.find_targets(model, graph, config)
    lookahead = Lookahead(model, graph, units, selection, config)
    return Recipe(
        structures=units,
        measured_scores=lookahead.measure,
        needs_data=config.activations,
        selection=lookahead.select,
        schedule=schedules.staircase(config.begin, config.end, config.rounds),
        gates=lookahead.gates,
    )


TINY = {
    "together": LookaheadConfig(final_sparsity=0.6, begin=0.2, end=0.6),
    "global_rounds": LookaheadConfig(
        final_sparsity=0.6, begin=0.2, end=0.6, scope="global", rounds=3, streams="writers"
    ),
    "forward": LookaheadConfig(final_sparsity=0.6, begin=0.2, order="forward", splits=2, activations=True),
    "flops": LookaheadConfig(target_flops=0.6, begin=0.2, end=0.6, rounds=2, scope="global"),
}
