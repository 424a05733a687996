"""Channel similarity: of channels that say the same, one stays (Zhang et al. 2019, arXiv 1908.02620).

Idea      where all channels are large, size says nothing, but many are near copies. Channels are clustered by the
          expected squared gap between their maps, and one of each cluster stays; no training is needed.
Equations channel c is N(beta_c, gamma_c^2) behind its norm; E(Y_i - Y_j)^2 / (E Y_i^2 + E Y_j^2) with Y = relu(Z), from
          means and second moments -> `parts.moments`; average linkage, and the height at which a channel is
          absorbed -> `absorb`; a dropped channel is a Y_i + c to its readers, a = Cov / Var -> `Merging`.
Differs   Only the abstracts could be read; metric and clustering are a reconstruction that does what they say. How
          channels correlate has four readings: cosine of filters (exact for white inputs; the default), measured on
          data ("empirical", at what the next layers read), none ("independent") and equality of distributions
          ("distribution"); the last two cannot tell copies from strangers and are for comparison. A merged cluster is
          represented by that one of its two parts' representatives which is nearer to all members, so that what stays
          is nested over budgets. Layers' widths come from one height for all trees. Merging into the readers is ours;
          where padding meets an offset c it is wrong by c at the border. Heads are not clustered.
Related   `magnitude` would halve a layer of equal norms at random.
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
from hf_prune.graph.constants import Layer, find_layer
from hf_prune.graph.groups import unit_indices
from hf_prune.graph.writers import Writer
from hf_prune.parts import schedules, statistics, targets
from hf_prune.parts.channel_gates import ChannelTarget, channel_targets
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.moments import Moments, distance, fit, gaussian, rectified
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import dense_parameter
from hf_prune.parts.selection import Selection
from hf_prune.parts.statistics import Calibration, Point, gather
from hf_prune.types import Paper, Plan

PAPER = Paper(
    title="Exploiting Channel Similarity for Accelerating Deep Convolutional Neural Networks",
    authors="Yunxiang Zhang, Chenglong Zhao, Bingbing Ni, Jian Zhang, Haoran Deng",
    year=2019,
    arxiv="1908.02620",
    status="reconstruction",
    bibtex="""@article{zhang2019exploiting,
  title   = {Exploiting Channel Similarity for Accelerating Deep Convolutional Neural Networks},
  author  = {Zhang, Yunxiang and Zhao, Chenglong and Ni, Bingbing and Zhang, Jian and Deng, Haoran},
  journal = {arXiv preprint arXiv:1908.02620},
  year    = {2019}
}""",
)
NEEDS_TRAINING = False
GOALS = targets.COUNTED
TINY_MODEL = "image"


@dataclass(frozen=True)
class ChannelSimilarityConfig(PruneConfig):
    """Scope "global" cuts all layers' trees at one height, "per_group" leaves the same fraction of each."""

    method = "channel_similarity"
    rounds_widths = True

    structure: str = "group"
    correlation: str = "filter"  # "filter", "empirical" (needs data), "independent", "distribution"
    activation: str = "relu"  # what follows the norm: "relu", or "none" to compare what the norm gives
    linkage: str = "average"  # distance of two clusters: "average" or "complete"
    repair: str = "merge"  # "merge": the readers take dropped channels from their representatives; "none"
    residual: bool = False  # also prune residual streams, by the mean over their layers
    calibration_batches: int = 4  # batches that "empirical" looks at

    def __post_init__(self) -> None:
        super().__post_init__()
        targets.settle_structure(self)
        require_choice("correlation", self.correlation, ("filter", "empirical", "independent", "distribution"))
        require_choice("activation", self.activation, ("relu", "none"))
        require_choice("linkage", self.linkage, ("average", "complete"))
        require_choice("repair", self.repair, ("merge", "none"))
        require_range("calibration_batches", self.calibration_batches, 1, math.inf, closed_right=False)


Config = ChannelSimilarityConfig


def absorb(near: Tensor, strength: Tensor, linkage: str) -> tuple[Tensor, list[int]]:
    """Height at which each channel is absorbed (infinite for the last one), and by which.

    near: `(C, C)` squared distances.  strength: `(C,)`, the larger one represents where both are as near to the rest.
    """
    from scipy.cluster.hierarchy import linkage as cluster
    from scipy.spatial.distance import squareform

    apart = near.sqrt().cpu().numpy()
    heights, by = torch.full((len(near),), torch.inf, dtype=torch.float64), list(range(len(near)))
    clusters = [([channel], channel) for channel in range(len(near))]  # members, representative
    for first, second, height, _ in cluster(squareform(apart, checks=False), linkage):
        (left, one), (right, other) = clusters[int(first)], clusters[int(second)]
        members = left + right
        totals = [(round(float(apart[each, members].sum()), 9), -float(strength[each]), each) for each in (one, other)]
        stays, goes = (one, other) if totals[0] <= totals[1] else (other, one)
        heights[goes], by[goes] = height, stays
        clusters.append((members, stays))
    return heights, by


class Merging:
    """Distances, trees and the merge of one run: scores once, then a selection that also hands channels over."""

    def __init__(
        self, model: nn.Module, graph: Any, found: Sequence[ChannelTarget], config: ChannelSimilarityConfig
    ) -> None:
        self.model, self.graph, self.found, self.config = model, graph.traced, found, config
        self.cheapest: Selection = targets.choose_units(graph, [each.units for each in found], config)
        self.by: dict[str, list[int]] = {}
        self.seen: dict[tuple[str, str], Moments] = {}

    @torch.no_grad()
    def scores(self, calibration: Calibration) -> dict[str, Tensor]:
        """Height at which each channel is absorbed."""
        if self.config.correlation == "empirical":
            self.seen = self._measured(calibration)
        else:
            self.seen = {(each.units.name, w.layer): self._modelled(w) for each in self.found for w in each.writers}
        scores = {}
        for each in self.found:
            own = [moments for (name, _), moments in self.seen.items() if name == each.units.name]
            near = torch.stack([distance(moments) for moments in own]).mean(0)
            strength = torch.stack([moments.second.diagonal() for moments in own]).sum(0)
            scores[each.units.name], self.by[each.units.name] = absorb(near, strength, self.config.linkage)
        return scores

    def _measured(self, calibration: Calibration) -> dict[tuple[str, str], Moments]:
        points = {}
        for each in self.found:
            readers = [layer for layer in self._readers(each) if self._whole(each, layer)]
            taken_in = bool(readers) and self.config.activation != "none"
            for path in [_path(layer) for layer in readers] if taken_in else [w.host for w in each.writers]:
                points[each.units.name, path] = Point(path, statistics.moments, taken_in)
        seen = gather(self.model, calibration.batches(self.config.calibration_batches), points)
        return {key: Moments(value[:-1, -1], value[:-1, :-1]) for key, value in seen.items()}

    def _modelled(self, writer: Writer) -> Moments:
        """From norm and filters; without a norm, from bias and filters as on white inputs."""
        layer: Any = self.model.get_submodule(writer.layer)
        filters = dense_parameter(self.model, f"{writer.layer}.weight").double().movedim(writer.dim, 0).flatten(1)
        norm: Any = self.model.get_submodule(writer.norm) if writer.norm else None
        if norm is None:
            gamma = filters.norm(dim=1)
            beta = torch.zeros_like(gamma) if layer.bias is None else layer.bias.double()
        else:
            beta, gamma = (norm.bias.double(), norm.weight.double()) if norm.affine else _standard(filters)
        if self.config.correlation == "distribution":
            return gaussian(beta, gamma.abs(), torch.ones(len(gamma), len(gamma)).to(gamma))
        cosine = F.normalize(filters, dim=1) @ F.normalize(filters, dim=1).T
        rho = cosine.clamp(-1.0, 1.0) if self.config.correlation == "filter" else torch.zeros_like(cosine)
        return (rectified if self.config.activation == "relu" else gaussian)(beta, gamma, rho)

    @torch.no_grad()
    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """The channels that stay; readers take over the others first."""
        plan = self.cheapest(scores, share)
        if self.config.repair == "merge":
            for each in self.found:
                for reader in self._readers(each):
                    self._hand_over(each, reader, plan[each.units.name].cpu())
        return plan

    def _hand_over(self, target: ChannelTarget, reader: Layer, keep: Tensor) -> None:
        """`W[:, i] += a W[:, j]` and `bias += sum of W[:, j] c` for every dropped j that i represents."""
        moments = self._read_by(target, reader)
        if moments is None:
            return
        weight = dense_parameter(self.model, reader.weight)
        constant = reader.bias or reader.mean
        for member in target.units.group.members:
            if member.tensor != reader.weight or not member.reads:
                continue
            columns = weight.movedim(member.dim, 0)
            places = unit_indices(member, target.units.units).to(weight.device)
            for j in (~keep).nonzero().flatten().tolist():
                i = self._representative(target, keep, j)
                slope, offset = fit(moments, i, j, through_zero=constant is None)
                dropped = columns[places[j]].clone()
                columns[places[i]] += slope * dropped
                if constant is not None:
                    shift = offset * dropped.sum([0, *range(2, dropped.ndim)])
                    tensor = dense_parameter(self.model, constant)
                    tensor += shift if reader.bias else -shift

    def _representative(self, target: ChannelTarget, keep: Tensor, channel: int) -> int:
        while not keep[channel]:
            channel = self.by[target.units.name][channel]
        return channel

    def _read_by(self, target: ChannelTarget, reader: Layer) -> Moments | None:
        """Moments of what `reader` takes in, where they are known: measured there, or behind a single writer."""
        own = {path: moments for (name, path), moments in self.seen.items() if name == target.units.name}
        kernels = [
            m for m in target.units.group.members if not m.reads and dense_parameter(self.model, m.tensor).ndim > 1
        ]
        single = len(kernels) == 1 and self.config.correlation != "distribution"
        return own.get(_path(reader)) or (next(iter(own.values())) if single else None)

    def _readers(self, target: ChannelTarget) -> list[Layer]:
        """Every use of a weight that reads the channels."""
        names = {member.tensor for member in target.units.group.members if member.reads}
        layers = [find_layer(self.graph.flow, node) for node in self.graph.flow.trace.graph.nodes]
        return [layer for layer in layers if layer is not None and layer.weight in names]

    def _whole(self, target: ChannelTarget, reader: Layer) -> bool:
        """Whether the reader's inputs are the channels and nothing else, one each."""
        weight = dense_parameter(self.model, reader.weight)
        return weight.shape[reader.reads] == target.units.units


def _path(layer: Layer) -> str:
    return layer.weight.rpartition(".")[0]


def _standard(filters: Tensor) -> tuple[Tensor, Tensor]:
    return filters.new_zeros(len(filters)), filters.new_ones(len(filters))


def build(model: nn.Module, graph: Any, config: ChannelSimilarityConfig) -> Recipe:
    """One selection from the model as it is then, for good."""
    found = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    merging = Merging(model, graph, found, config)
    return Recipe(
        structures=[each.units for each in found],
        measured_scores=merging.scores,
        needs_data=config.correlation == "empirical",
        selection=merging.select,
        schedule=schedules.one_shot(config.begin),
        gates=[MaskGate(each.units, next(model.parameters()).device) for each in found],
    )


TINY = {
    "filter": ChannelSimilarityConfig(target_params=0.7, begin=0.2),
    "empirical": ChannelSimilarityConfig(target_flops=0.7, begin=0.2, correlation="empirical", residual=True),
    "distribution": ChannelSimilarityConfig(
        target_params=0.7, begin=0.2, correlation="distribution", scope="per_group", linkage="complete"
    ),
}
