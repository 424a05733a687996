"""Weight importance: what the loss says a weight is worth, not its size (Li et al. 2020, arXiv 2006.10903).

Idea      the natural worth of a set of weights is the loss that its removal adds. In linear models that is covariance
          scaling, the Hessian's criterion; magnitude agrees only if all features vary alike, and where layers are
          scaled against each other it removes whole layers that matter.
Equations N(set) = L(without it) - L -> `curvature.natural`, against zero or given values; h_i theta_i^2 / 2 with
          h_i = E[g_i^2] over examples ("fisher": labels drawn from the model's answer; "empirical": true labels),
          E[x_j^2] of the layer's inputs ("covariance"), E[v_i (Hv)_i] with random signs v ("hessian")
          -> `curvature.curvature`; of a unit, E[(sum g_i theta_i)^2] / 2 over the weights that read it, which is the
          Fisher of a gate on it -> `unit_scores`.
Differs   Reconstructed from the abstract and its algebra. "fisher" is the default since true labels say nothing once
          they are fitted. Ranking is global. "natural" ranks units by one pass each over the data, singly: that two
          duplicates are worthless alone does not show. "covariance" and "hessian" score single weights only.
Related   `lookahead` is as invariant to rescaling and needs no data; `magnitude` is what `diagnose` compares with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.graph.trace import evaluating
from hf_prune.parts import schedules, targets
from hf_prune.parts.curvature import curvature, example_gradients, natural
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import dense_parameter
from hf_prune.parts.selection import keep_highest, lasting
from hf_prune.parts.statistics import Batch, Calibration, Data, RunningMean
from hf_prune.types import Paper, Structure

PAPER = Paper(
    title="Exploring Weight Importance and Hessian Bias in Model Pruning",
    authors="Mingchen Li, Yahya Sattar, Christos Thrampoulidis, Samet Oymak",
    year=2020,
    arxiv="2006.10903",
    status="reconstruction",
    bibtex="""@article{li2020exploring,
  title   = {Exploring Weight Importance and {Hessian} Bias in Model Pruning},
  author  = {Li, Mingchen and Sattar, Yahya and Thrampoulidis, Christos and Oymak, Samet},
  journal = {arXiv preprint arXiv:2006.10903},
  year    = {2020}
}""",
)
NEEDS_TRAINING = False
GOALS = targets.GOALS

ELEMENT_SCORES = ("fisher", "empirical", "covariance", "hessian")
UNIT_SCORES = ("fisher", "empirical", "natural")


@dataclass(frozen=True)
class WeightImportanceConfig(PruneConfig):
    """`final_sparsity` ranks single weights, `target_*` whole units; both need data."""

    method = "weight_importance"
    rounds_widths = True

    structure: str = ""  # "element" (single weights) or "group" (whole units); empty: what the goal needs
    score: str = "fisher"  # "fisher", "empirical", "covariance", "hessian" (single weights), "natural" (units)
    calibration_batches: int = 32  # batches that scores are measured on; "fisher" and "empirical" go row by row
    rounds: int = 1  # removals between begin and end of a training run, each with new scores

    def __post_init__(self) -> None:
        super().__post_init__()
        targets.settle_structure(self)
        require_choice("score", self.score, ELEMENT_SCORES if self.structure == "element" else UNIT_SCORES)
        for name in ("calibration_batches", "rounds"):
            require_range(name, getattr(self, name), 1, float("inf"), closed_right=False)


Config = WeightImportanceConfig


def weight_scores(model: nn.Module, h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`h theta^2 / 2` of each weight, `(weights,)` in the order of the tensor."""
    return {name: (each * dense_parameter(model, name).detach().square() / 2).flatten() for name, each in h.items()}


def unit_scores(
    model: nn.Module, batches: Iterable[Batch], units: Sequence[Structure], *, sampled: bool, seed: int = 0
) -> dict[str, Tensor]:
    """`E[(sum over the unit's weights of g theta)^2] / 2`, `(units,)`; over those that read it, if there are any."""
    own = {each.name: [t for t in each.tensors if t not in each.producers] or each.producers for each in units}
    tensors = sorted({tensor for names in own.values() for tensor in names})
    means = {each.name: RunningMean() for each in units}
    for gradients in example_gradients(model, batches, tensors, sampled=sampled, seed=seed):
        moved = {name: grad * dense_parameter(model, name).detach() for name, grad in gradients.items()}
        for each in units:
            total = sum(each.view(moved[tensor], tensor).sum(1) for tensor in own[each.name])
            means[each.name].add(torch.as_tensor(total).square() / 2, 1)
    return {name: mean.result() for name, mean in means.items()}


@dataclass(frozen=True)
class Diagnosis:
    """How two rankings treat one layer when all layers together lose the given share of their weights."""

    layer: str
    correlation: float
    """Spearman's, of magnitude with the Fisher score within the layer."""
    kept_by_magnitude: float
    kept_by_fisher: float
    natural: float
    """Loss that removing the whole layer adds."""

    @property
    def warning(self) -> str | None:
        """Why magnitude misleads here, or None."""
        if self.kept_by_magnitude < 0.01 <= self.kept_by_fisher:
            return f"magnitude would remove all but {self.kept_by_magnitude:.1%} of a layer that matters"
        if self.correlation < 0.3:
            return f"magnitude and loss hardly agree on which weights matter (rank correlation {self.correlation:.2f})"
        return None


def diagnose(
    model: nn.Module,
    data: Data,
    *,
    sparsity: float = 0.9,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    batches: int = 8,
) -> list[Diagnosis]:
    """One entry a layer, from the first `batches` of labelled `data`; the model stays as it is."""
    names = list(prunable_weights(model, include, exclude))
    calibration = Calibration(model, data)
    with evaluating(model):
        fisher = weight_scores(model, curvature(model, calibration.batches(batches), names, source="fisher"))
        layers = [{name: torch.ones_like(dense_parameter(model, name), dtype=torch.bool)} for name in names]
        losses = natural(model, lambda: calibration.batches(batches), layers)
    sizes = {name: dense_parameter(model, name).detach().double().abs().flatten() for name in names}
    kept = [_kept(scores, sparsity) for scores in (sizes, fisher)]
    return [
        Diagnosis(
            name.removesuffix(".weight"), _spearman(sizes[name], fisher[name]), kept[0][name], kept[1][name], loss
        )
        for name, loss in zip(names, losses, strict=True)
    ]


def _kept(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    total = sum(map(len, scores.values()))
    keeps = keep_highest(list(scores.values()), round((1 - sparsity) * total))
    return {name: float(keep.double().mean()) for name, keep in zip(scores, keeps, strict=True)}


def _spearman(left: Tensor, right: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(left.cpu(), right.cpu()).statistic)


def build(model: nn.Module, graph: Any, config: WeightImportanceConfig) -> Recipe:
    """Masks that follow the measured scores at each rise of the schedule."""
    units, selection = targets.find_targets(model, graph, config)
    gates = [MaskGate(each, next(model.parameters()).device) for each in units]

    def measure(calibration: Calibration) -> Mapping[str, Tensor]:
        batches = calibration.batches(config.calibration_batches)
        if config.structure == "element":
            names = [each.name for each in units]
            return weight_scores(model, curvature(model, batches, names, source=config.score, seed=config.seed))
        if config.score != "natural":
            return unit_scores(model, batches, units, sampled=config.score == "fisher", seed=config.seed)
        again = partial(calibration.batches, config.calibration_batches)
        return {each.name: torch.tensor(natural(model, again, _single_units(each, model))) for each in units}

    return Recipe(
        structures=units,
        measured_scores=measure,
        selection=lasting(gates, selection),
        schedule=schedules.staircase(config.begin, config.end, config.rounds),
        gates=gates,
    )


def _single_units(units: Structure, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Each unit by itself, as a set of weights."""
    for unit in range(units.units):
        keep = torch.arange(units.units, device=next(model.parameters()).device) != unit
        yield {tensor: ~units.expand(keep, tensor) for tensor in units.tensors}


TINY = {
    "fisher": WeightImportanceConfig(final_sparsity=0.6, begin=0.2, end=0.6, rounds=2),
    "hessian": WeightImportanceConfig(final_sparsity=0.6, begin=0.2, score="hessian", seed=1),
    "params": WeightImportanceConfig(target_params=0.8, begin=0.2),
    "natural": WeightImportanceConfig(target_params=0.8, begin=0.2, score="natural"),
}
