"""Pruning filters while training: no stage after it (Roy, Panda, Srinivasan & Raghunathan 2020, arXiv 2003.02800).

Idea      filters go at fixed intervals in the first part of one training, from random weights or trained ones, and the
          rest of it is what retraining would have been. What is gone costs nothing in any later step.
Equations p C / K of the C filters of a layer go at each of K events, counted from totals -> `schedules.staircase`,
          `selection.top_units`; L1 norm of a filter over the inputs that are left -> `targets.sizes`; mean activation
          behind the nonlinearity -> `mean_activations`; a shuffle -> `scores.random_ranks`.
Differs   Only the abstract could be had. Ours are: the events (11, from a tenth to six tenths of the steps), the
          absolute value of activations, over calibration batches in evaluation mode and where the next layer reads the
          channel (at the layer itself where no plain layer reads it), and one shuffle for all events. Every width of
          the model takes part, heads, neurons and residual streams too, unless `include` says otherwise; a stream's
          filters are ranked by their mean over all layers that write it. The goal may also be a price.
Related   `magnitude` along its cubic schedule masks the same filters by the same scores, and takes some back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.graph.writers import LAYERS
from hf_prune.parts import schedules, statistics, targets
from hf_prune.parts.budgets import normalised
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import dense_parameter, random_ranks
from hf_prune.parts.statistics import Calibration, Point, gather
from hf_prune.types import Paper, PruneError, Structure

PAPER = Paper(
    title="Pruning Filters while Training for Efficiently Optimizing Deep Learning Networks",
    authors="Sourjya Roy, Priyadarshini Panda, Gopalakrishnan Srinivasan, Anand Raghunathan",
    year=2020,
    arxiv="2003.02800",
    status="reconstruction",
    bibtex="""@inproceedings{roy2020pruning,
  title     = {Pruning Filters while Training for Efficiently Optimizing Deep Learning Networks},
  author    = {Roy, Sourjya and Panda, Priyadarshini and Srinivasan, Gopalakrishnan and Raghunathan, Anand},
  booktitle = {International Joint Conference on Neural Networks},
  year      = {2020}
}""",
)
NEEDS_TRAINING = True
GOALS = targets.COUNTED
TINY_MODEL = "image"

SCORES = ("l1", "mean_activation", "random")


@dataclass(frozen=True)
class PruneWhileTrainingConfig(PruneConfig):
    """`target_units=0.2` is the abstract's 80 % of all filters."""

    method = "prune_while_training"
    rounds_widths = True

    structure: str = "group"
    scope: str = "per_group"
    begin: float = 0.1
    end: float = 0.6
    score: str = "l1"  # which units stay: "l1" (largest weights), "mean_activation" (most active), "random"
    events: int = 11  # how often units go: first at `begin`, last at `end`, equally many each time
    calibration_batches: int = 16  # batches that mean activations are measured on
    normalised_groups: bool = False  # also prune groups under LayerNorm-like statistics, which is not exact

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("score", self.score, SCORES)
        targets.settle_structure(self)
        require_choice("structure", self.structure, ("group",))
        for name in ("events", "calibration_batches"):
            require_range(name, getattr(self, name), 1, math.inf, closed_right=False)


Config = PruneWhileTrainingConfig


def mean_activations(
    model: nn.Module, units: Sequence[Structure], batches: int
) -> Callable[[Calibration], dict[str, Tensor]]:
    """Mean absolute activation of each unit over `batches` calibration batches, as what reads the group takes it in."""
    seen = {each.name: _where(model, each) for each in units}
    points = {
        name: Point(tensor.rpartition(".")[0], statistics.mean_absolute, taken_in)
        for name, (tensor, taken_in) in seen.items()
    }

    def scores(calibration: Calibration) -> dict[str, Tensor]:
        means = gather(model, calibration.batches(batches), points)
        return normalised({each.name: _by_unit(model, each, seen[each.name][0], means[each.name]) for each in units})

    return scores


def _where(model: nn.Module, structure: Structure) -> tuple[str, bool]:
    """A weight whose layer shows the activations of the units, and whether they are what the layer takes in."""
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in structure.tensors}
    plain = [name for name, layer in layers.items() if isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1]
    weights = [name for name in plain if name.endswith(".weight")]
    readers = [name for name in weights if name not in structure.producers]
    if not weights:
        raise PruneError(
            f"no linear or convolution layer shows the activations of group {structure.name!r}; add its layers to "
            "exclude, or choose another score."
        )
    return (readers[0], True) if readers else (weights[0], False)


def _by_unit(model: nn.Module, structure: Any, tensor: str, means: Tensor) -> Tensor:
    """One value for each entry of the dimension of `tensor` that holds the units -> one for each unit, `(units,)`."""
    shape = dense_parameter(model, tensor).shape
    dim = next(member.dim for member in structure.group.members if member.tensor == tensor)
    along = means.float().view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
    values, entries = (structure.view(each, tensor).sum(dim=1) for each in (along, torch.ones_like(along)))
    return values / entries.clamp(min=1.0)  # units that are gone have no entries


def build(model: nn.Module, graph: Any, config: PruneWhileTrainingConfig) -> Recipe:
    """Masks that drop more at every event, and are cut out of the model there."""
    units, selection = targets.find_targets(model, graph, config, normalised_groups=config.normalised_groups)
    of_weights = {
        "l1": targets.sizes(model, units, order=1),
        "random": lambda: {each.name: random_ranks(each, config.seed) for each in units},
    }
    of_data = {"mean_activation": mean_activations(model, units, config.calibration_batches)}
    device = next(model.parameters()).device
    return Recipe(
        structures=units,
        scores=of_weights.get(config.score),
        measured_scores=of_data.get(config.score),
        selection=selection,
        schedule=schedules.staircase(config.begin, config.end, config.events),
        fixed_from=config.end,
        shrink_at=schedules.rises(config.begin, config.end, config.events),
        gates=[MaskGate(each, device) for each in units],
    )


TINY = {
    "l1": PruneWhileTrainingConfig(target_units=0.5, begin=0.2, events=3),
    "mean_activation": PruneWhileTrainingConfig(target_units=0.5, begin=0.2, events=3, score="mean_activation"),
    "random_flops": PruneWhileTrainingConfig(target_flops=0.6, scope="global", begin=0.2, events=2, score="random"),
}
