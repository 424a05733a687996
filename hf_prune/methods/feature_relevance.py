"""Feature relevance: channels that pass on little of the right answer go (Aketi et al. 2020, arXiv 2002.09958).

Idea      hand the score of the true class back through the network as relevance; a channel that passes little of it on
          is not needed. A few go every few epochs of an ordinary training run, which needs no fine-tuning afterwards.
Equations R_i = x_i sum_j (alpha w+ R_j / z+ - beta w- R_j / z-), alpha 2, from the one-hot true label
          -> `parts.relevance`; score = |mean over classes k of w_k * mean over images of k and places of R|,
          w_k = sigmoid(max acc / acc_k), over the layer's L2 norm -> `Relevance.scores`; x channels every n epochs
          until N1 -> the schedule.
Differs   Read from the authors' code. They add 1e-9 to the negative sum too, which can cross zero: here it is taken
          away, and an output with contributions of one sign only keeps its relevance. Classes are counted by images
          alone. The goal and `rounds` give the channels of each step; `calibration_batches` may look at a part of the
          training rows, theirs at all. Every width inside a block is eligible, the first one too; of each at least
          `min_keep` stays. Streams keep their width unless `residual`, which sums over the layers that add into one.
          What is removed is cut out at once. Transformers are an extension: relevance passes attention by the values.
Related   `weight_importance` asks the gradient, `lookahead` the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.graph.writers import LAYERS
from hf_prune.parts import schedules, targets
from hf_prune.parts.channel_gates import ChannelTarget, channel_targets
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.relevance import propagating
from hf_prune.parts.selection import lasting
from hf_prune.parts.statistics import Batch, Calibration, RunningMean
from hf_prune.types import Paper, PruneError

PAPER = Paper(
    title="Gradual Channel Pruning While Training Using Feature Relevance Scores for Convolutional Neural Networks",
    authors="Sai Aparna Aketi, Sourjya Roy, Anand Raghunathan, Kaushik Roy",
    year=2020,
    arxiv="2002.09958",
    status="reconstruction",
    bibtex="""@article{aketi2020gradual,
  title   = {Gradual Channel Pruning While Training Using Feature Relevance Scores for Convolutional Neural Networks},
  author  = {Aketi, Sai Aparna and Roy, Sourjya and Raghunathan, Anand and Roy, Kaushik},
  journal = {IEEE Access},
  volume  = {8},
  year    = {2020}
}""",
)
NEEDS_TRAINING = True
GOALS = targets.COUNTED
TINY_MODEL = "image"


@dataclass(frozen=True)
class FeatureRelevanceConfig(PruneConfig):
    """Defaults are the authors' 200 epochs: channels go at epochs 21, 42 ... 147, the rest is for converging."""

    method = "feature_relevance"
    rounds_widths = True

    structure: str = "group"
    begin: float = 21 / 200
    end: float = 147 / 200
    min_keep: float = 0.1
    rounds: int = 7  # removals between begin and end, each with new scores
    alpha: float = 2.0  # weight of positive contributions, from 1; negative ones have alpha - 1
    class_weight: str = "accuracy"  # "accuracy": classes that are learned badly count more; "equal"
    residual: bool = False  # also prune residual streams
    calibration_batches: int = 100  # training batches that relevance is measured on, each time
    removal: str = "shrink"  # "shrink": cut channels out at once, so that later steps cost less; "mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        targets.settle_structure(self)
        require_choice("class_weight", self.class_weight, ("accuracy", "equal"))
        require_choice("removal", self.removal, ("shrink", "mask"))
        require_range("alpha", self.alpha, 1.0, math.inf, closed_right=False)
        for name in ("rounds", "calibration_batches"):
            require_range(name, getattr(self, name), 1, math.inf, closed_right=False)


Config = FeatureRelevanceConfig


def class_weights(accuracy: Tensor) -> Tensor:
    """sigmoid(best / own), `(classes,)`: 0.731 for the best class, 1 for one that is never right while others are."""
    return torch.sigmoid((accuracy.max() / accuracy).nan_to_num(nan=1.0, posinf=torch.inf))


class Relevance:
    """Measures the relevance of every target's channels, class by class."""

    def __init__(self, model: nn.Module, found: Sequence[ChannelTarget], config: FeatureRelevanceConfig) -> None:
        self.model, self.found, self.config = model, found, config

    def scores(self, calibration: Calibration) -> Mapping[str, Tensor]:
        """Of each channel, over the L2 norm of its layer's."""
        flowed = {each.units.name: RunningMean() for each in self.found}  # over all images: classes, channels
        counts = RunningMean()  # over all images: of each class, and right ones of each class
        for batch in calibration.batches(self.config.calibration_batches):
            relevance, classes, right = self._pass(batch)
            counts.add(torch.stack([classes.sum(0), (classes * right[:, None]).sum(0)]), len(classes))
            for name, own in relevance.items():
                flowed[name].add(classes.T @ own, len(classes))
        share, right = counts.result()
        present = share > 0
        accuracy = right[present] / share[present]
        weights = class_weights(accuracy) if self.config.class_weight == "accuracy" else torch.ones_like(accuracy)
        scores = {}
        for each in self.found:
            mean = flowed[each.units.name].result()[present] / share[present, None]
            score = each.units.spread((mean * weights[:, None]).mean(0).abs())
            scores[each.units.name] = score / score.norm().clamp(min=torch.finfo(score.dtype).tiny)
        return scores

    def _pass(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Relevance `(rows, channels)` by target, and of each row its one-hot class and whether the answer is right."""
        taps: dict[str, Tensor] = {}
        paths = {writer.layer for each in self.found for writer in each.writers}
        handles = [self.model.get_submodule(path).register_forward_hook(_keeper(taps, path)) for path in paths]
        try:
            with propagating(self.model, self.config.alpha):
                logits = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        finally:
            for handle in handles:
                handle.remove()
        classes, right = _classes(logits, batch)
        found = torch.autograd.grad(logits, list(taps.values()), classes.to(logits), allow_unused=True)
        unreached = [path for path, value in zip(taps, found, strict=True) if value is None]
        if unreached:
            raise PruneError(f"no relevance reaches {', '.join(unreached)}, which only gate others: exclude them.")
        means = {
            path: _over_places(self.model.get_submodule(path), value, batch)
            for path, value in zip(taps, found, strict=True)
        }
        own = {
            each.units.name: torch.stack([means[writer.layer] for writer in each.writers]).sum(0) for each in self.found
        }
        return own, classes, right


def _keeper(taps: dict[str, Tensor], path: str) -> Any:
    def keep(module: nn.Module, taken: Any, output: Tensor) -> None:
        taps[path] = output

    return keep


def _classes(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    labels = batch.get("labels")
    if labels is None or labels.ndim != 1 or logits.ndim != 2:
        raise PruneError(
            "relevance starts from one label a row: labels must be (rows,) and logits (rows, classes), got "
            f"{None if labels is None else tuple(labels.shape)} and {tuple(logits.shape)}."
        )
    if logits.shape[1] == 1:  # regression: one class of everything
        ones = torch.ones(len(labels), 1, dtype=torch.float64, device=logits.device)
        return ones, ones[:, 0]
    return F.one_hot(labels, logits.shape[1]).double(), (logits.argmax(1) == labels).double()


def _over_places(module: nn.Module, relevance: Tensor, batch: Batch) -> Tensor:
    """Mean over positions or valid tokens, `(rows, channels)`, double precision."""
    relevance = relevance.double()
    if not isinstance(module, LAYERS[:2]):
        return relevance.flatten(2).mean(2)
    mask = batch.get("attention_mask")
    if relevance.ndim == 3 and mask is not None:
        return (relevance * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return relevance.flatten(1, -2).mean(1) if relevance.ndim > 2 else relevance


def build(model: nn.Module, graph: Any, config: FeatureRelevanceConfig) -> Recipe:
    """Channels that go for good at every rise of the schedule."""
    found = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    units = [each.units for each in found]
    gates = [MaskGate(each, next(model.parameters()).device) for each in units]
    between = (config.end - config.begin) / max(config.rounds - 1, 1)
    return Recipe(
        structures=units,
        measured_scores=Relevance(model, found, config).scores,
        selection=lasting(gates, targets.choose_units(graph, units, config)),
        schedule=schedules.staircase(config.begin, config.end, config.rounds),
        gates=gates,
        shrink_at=[config.begin + i * between for i in range(config.rounds)] if config.removal == "shrink" else (),
    )


TINY = {
    "shrink": FeatureRelevanceConfig(target_params=0.7, begin=0.2, end=0.6, rounds=3),
    "mask": FeatureRelevanceConfig(
        target_flops=0.7, begin=0.2, end=0.8, rounds=2, residual=True, class_weight="equal", removal="mask"
    ),
}
