"""Magnitude pruning: small weights, filters, heads and neurons go first; the baseline of every other method.

Idea      a unit's worth is the size of its weights; no data is needed. One call prunes a trained model at once; under
          `PruneTrainer` the same ranking is applied to the current weights along a cubic schedule.
Equations score = mean |w| ("l1", Li et al. 2017, section 3.1, divided by the unit's size) or root mean square ("l2")
          -> `targets.sizes`; a seeded permutation ("random"); cubic schedule of Zhu & Gupta 2017, eq. 1
          -> `schedules.cubic`.
Differs   Li et al. rank the filters of each layer by themselves (`scope="per_group"`); the global ranking divides each
          group's scores by their mean, without which layers of small weights would vanish whole. Units of a group are
          scored by the tensors that produce them, whichever operation couples them; whole layers by all their weights.
Related   `movement` with variant "magnitude" is the unstructured baseline of its paper, under that paper's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice
from hf_prune.parts import schedules, targets
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import random_ranks
from hf_prune.types import Paper, Structure

PAPER = Paper(
    title="Pruning Filters for Efficient ConvNets",
    authors="Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet, Hans Peter Graf",
    year=2017,
    arxiv="1608.08710",
    bibtex="""@inproceedings{li2017pruning,
  title     = {Pruning Filters for Efficient ConvNets},
  author    = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year      = {2017}
}""",
)
NEEDS_TRAINING = False
GOALS = targets.GOALS
TINY_MODEL = "image"
TINY_MODELS = {"layers": "deep"}  # variant -> another model than that

SCORES = ("l1", "l2", "random")


@dataclass(frozen=True)
class MagnitudeConfig(PruneConfig):
    """`final_sparsity` removes single weights, `target_*` whole units of dimension groups."""

    method = "magnitude"
    rounds_widths = True

    structure: str = ""  # "element" (weights), "group" (units), "layer" (whole layers); empty: what the goal needs
    score: str = "l1"  # "l1": mean |w|; "l2": root mean square; "random": a seeded permutation
    normalised_groups: bool = False  # also prune under LayerNorm-like statistics, which is not exact

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("score", self.score, SCORES)
        targets.settle_structure(self, layers=True)


Config = MagnitudeConfig


def build(model: nn.Module, graph: Any, config: MagnitudeConfig) -> Recipe:
    """Rank by size along the schedule; masks until the end, where groups are shrunk."""
    units, selection = targets.find_targets(model, graph, config, normalised_groups=config.normalised_groups)
    device = next(model.parameters()).device
    return Recipe(
        structures=units,
        scores=_scores(model, units, config),
        selection=selection,
        schedule=schedules.cubic(config.begin, config.end),
        gates=[MaskGate(each, device) for each in units],
    )


def _scores(model: nn.Module, units: list[Structure], config: MagnitudeConfig) -> Callable[[], Mapping[str, Tensor]]:
    if config.score == "random":
        return lambda: {each.name: random_ranks(each, config.seed) for each in units}
    return targets.sizes(model, units, order={"l1": 1, "l2": 2}[config.score])


TINY = {
    "element": MagnitudeConfig(final_sparsity=0.6, begin=0.2, end=0.6),
    "element_l2": MagnitudeConfig(final_sparsity=0.6, begin=0.2, end=0.6, score="l2", scope="per_group"),
    "flops": MagnitudeConfig(target_flops=0.5, begin=0.2, end=0.6),
    "units": MagnitudeConfig(target_units=0.5, begin=0.2, end=0.6, scope="per_group"),
    "params_per_group": MagnitudeConfig(target_params=0.5, begin=0.2, end=0.6, scope="per_group"),
    "layers": MagnitudeConfig(target_units=0.5, begin=0.2, end=0.6, structure="layer"),
    "bytes_random": MagnitudeConfig(target_bytes=0.5, begin=0.2, end=0.6, score="random"),
}
