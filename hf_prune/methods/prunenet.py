"""PruneNet: a short optimisation on data finds how wide each layer must be (Khetan, Karnin 2020, arXiv 2005.11282).

Idea      a channel matters by the variance that it brings to its readers. A few hundred batches adjust one multiplier a
          channel so that the outputs stay and what matters gathers in few channels; each layer then keeps the channels
          that hold the same share of its importance, so that redundant layers become narrow. Fine-tune what is left.
Equations s_c = Var(w_c . x), behind the norm, times ||W_next[:, c]||^2; q = s / sum s -> `importance`; L(u) = KL(dense
          || gated) + mu sum_l f_l R(u_l sqrt q_l), R(z) = (||z||_1 / ||z||_2)^2 / dim, f_l the layer's share of
          multiply-adds -> `fit_multipliers`, `concentration`; I_c = u_c^2 q_c / sum; the fewest channels that hold the
          share theta of I, one theta for all layers, by bisection to the goal -> `fit_share`.
Differs   Only the abstract could be had, and a reading list's two lines: the score is the variance of a layer's input
          after filtering, and there is a new regularisation. Both were looked for again. Every formula above but the
          variance is a reconstruction, and so are all defaults. Multipliers are thrown away after the choice. A channel
          that goes leaves its mean behind where its readers can take a constant over; readers that pad with zeros
          cannot, and lose it. Norms settle in fine-tuning. Covariances between the layers that add into a residual
          stream are left out.
Related   `magnitude` with `scope="per_group"` keeps the same share of channels of every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_goal, require_range, require_removal
from hf_prune.graph import Graph, unit_indices
from hf_prune.graph.writers import Silence
from hf_prune.parts import schedules
from hf_prune.parts.budgets import PRICES, Allowance, floors_alone, require_reachable
from hf_prune.parts.channel_gates import (
    ChannelGate,
    ChannelMask,
    ChannelTarget,
    along_channels,
    channel_targets,
    passing,
)
from hf_prune.parts.distillation import logits_divergence
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import dense_parameter
from hf_prune.parts.selection import Selection, floor_count, keep_highest
from hf_prune.parts.statistics import (
    Batch,
    Calibration,
    Point,
    first_moments,
    gather,
    mean_and_variance,
    mean_over_processes,
)
from hf_prune.types import Paper, Plan

PAPER = Paper(
    title="PruneNet: Channel Pruning via Global Importance",
    authors="Ashish Khetan, Zohar Karnin",
    year=2020,
    arxiv="2005.11282",
    status="reconstruction",
    bibtex="""@article{khetan2020prunenet,
  title   = {PruneNet: Channel Pruning via Global Importance},
  author  = {Khetan, Ashish and Karnin, Zohar},
  journal = {arXiv preprint arXiv:2005.11282},
  year    = {2020}
}""",
)
NEEDS_TRAINING = False
GOALS = ("target_flops", "target_params", "target_bytes", "target_latency")
TINY_MODEL = "image"

VIEWS = ("reader", "own")
SIGNALS = ("output", "rectified")


@dataclass(frozen=True)
class PruneNetConfig(PruneConfig):
    """Prunes at once, at `begin`, on `data=` or, in `PruneTrainer`, on training rows; then trains what is left.

    Each of `fit_batches` costs two forward passes and one backward pass. Small models on easy data need fewer.
    """

    method = "prunenet"

    structure: str = "group"
    min_keep: float = 0.05
    variance_batches: int = 80  # batches that variances are measured on: 5,000 images in batches of 64
    fit_batches: int = 300  # steps of the optimisation, a batch each; the data is read again where it is shorter
    fit_lr: float = 1e-2  # of its Adam, falling linearly to 0
    concentration_weight: float = 0.1  # mu
    view: str = "reader"  # "reader": variance as its readers scale it; "own": as the layer gives it
    signal: str = "output"  # "output": variance of what layer and norm give; "rectified": of its positive part
    residual: bool = False  # also residual streams, whose layers share one multiplier

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("global",))
        require_choice("view", self.view, VIEWS)
        require_choice("signal", self.signal, SIGNALS)
        require_range("variance_batches", self.variance_batches, 1, math.inf, closed_right=False)
        require_range("fit_batches", self.fit_batches, 0, math.inf, closed_right=False)
        require_range("fit_lr", self.fit_lr, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("concentration_weight", self.concentration_weight, 0.0, math.inf, closed_right=False)
        require_goal(self, GOALS)
        require_removal(self)


Config = PruneNetConfig


def concentration(z: Tensor) -> Tensor:
    """R in [1 / units, 1]: 1 where all of `z`, `(units,)`, are equal, 1 / units where one is alone; free of scale."""
    return z.abs().sum().square() / z.square().sum().clamp(min=torch.finfo(z.dtype).tiny) / len(z)


class MeanMask(ChannelMask):
    """A mask whose dropped channels leave their mean behind."""

    mean: Tensor

    def __init__(self, channels: int, like: Tensor, moves: bool) -> None:
        """moves: whether readers can take a constant over; else the mean stays 0."""
        super().__init__(channels, like)
        self.moves = moves
        self.register_buffer("mean", torch.zeros(channels, dtype=self.dtype, device=like.device))

    def left_behind(self) -> Tensor:
        """What dropped channels give, `(C,)`; 0 for the others."""
        return torch.where(self.keep, 0.0, self.mean)

    def forward(self, x: Tensor, host: nn.Module) -> Tensor:
        """`x` where kept, else the mean; or `x` times what the pass under way says."""
        masked = super().forward(x, host)
        return masked if self.passing is not None else masked + along_channels(self.left_behind(), x, host)


class MeanGate(ChannelGate[MeanMask]):
    """Folds what is left behind into the offset of each layer or norm, from where `shrink` moves it to readers."""

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """As any gate, and the means."""
        hosts: list[Any] = [model.get_submodule(writer.host) for writer in self.writers]
        left = [host.shared_function[0].left_behind() for host in hosts if hasattr(host, "shared_function")]
        super().fold(model)
        for host, values in zip(hosts, left, strict=bool(left)):
            if host.bias is not None:
                host.bias += values.to(host.bias)


@dataclass(frozen=True)
class Fit:
    """Measures, optimises and scores: everything that needs the data."""

    model: nn.Module
    targets: Sequence[ChannelTarget]
    gates: Sequence[MeanGate]
    graph: Graph
    config: PruneNetConfig

    def scores(self, calibration: Calibration) -> dict[str, Tensor]:
        """I of each channel, which sums to 1 in each group."""
        variances = self._measure(calibration.batches(self.config.variance_batches))
        q = [self.importance(target, variances[target.units.name]) for target in self.targets]
        u = fit_multipliers(
            q, self._divergence(calibration), self._shares(), self.config.concentration_weight, self.config.fit_lr,
            self.config.fit_batches,
        )  # fmt: skip
        scores = [multiplier.square() * share for multiplier, share in zip(u, q, strict=True)]
        return {gate.name: score / score.sum() for gate, score in zip(self.gates, scores, strict=True)}

    def _measure(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Variance of each group's channels, summed over its layers; keeps their means for those that will go."""
        reduce = _rectified if self.config.signal == "rectified" else first_moments
        hosts = [writer.host for target in self.targets for writer in target.writers]
        gathered = gather(self.model, batches, {host: Point(host, reduce) for host in hosts})
        variances = {}
        for target, gate in zip(self.targets, self.gates, strict=True):
            moments = [mean_and_variance(gathered[writer.host]) for writer in target.writers]
            variances[gate.name] = torch.stack([variance for _, variance in moments]).sum(0)
            for function, (mean, _) in zip(gate.functions, moments, strict=True):
                if function.moves:
                    function.mean.copy_(mean)
        return variances

    def importance(self, target: ChannelTarget, variance: Tensor) -> Tensor:
        """q, `(units,)`: the channel's share of its group's variance, as readers see it."""
        score = variance.to(torch.float32)
        if self.config.view == "reader":
            score = score * _squared_columns(self.model, target)
        return score / score.sum().clamp(min=torch.finfo(score.dtype).tiny)

    def _divergence(self, calibration: Calibration) -> Callable[[Sequence[Tensor]], Tensor]:
        """KL of the model with multipliers from the model without, on the next batch at each call."""
        stream = (batch for _ in count() for batch in calibration.batches(self.config.fit_batches))

        def divergence(u: Sequence[Tensor]) -> Tensor:
            batch = next(stream)
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                dense = self.model(**inputs)
            factors = {each: factor for gate, factor in zip(self.gates, u, strict=True) for each in gate.functions}
            with passing(factors):
                return logits_divergence(self.model(**inputs), [dense], batch, temperature=1.0)

        return divergence

    def _shares(self) -> list[float]:
        """f: the multiply-adds that each group's width costs, as shares of all groups'."""
        dense = self.graph.price().multiply_adds
        saved = [
            dense - self.graph.price({t.units.name: torch.arange(t.units.units) < 1}).multiply_adds
            for t in self.targets
        ]
        return [each / sum(saved) for each in saved]


def fit_multipliers(
    q: Sequence[Tensor],
    divergence: Callable[[Sequence[Tensor]], Tensor],
    shares: Sequence[float],
    weight: float,
    lr: float,
    steps: int,
) -> list[Tensor]:
    """u > 0 of each group that keeps the outputs and gathers importance in few channels; 1 before the first step."""
    a = [torch.full_like(each, math.log(math.e - 1.0)).requires_grad_() for each in q]
    optimizer = torch.optim.Adam(a, lr=lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / max(steps, 1))
    for _ in range(steps):
        with torch.enable_grad():
            u = [F.softplus(each) for each in a]
            spread = [f * concentration(each * share.sqrt()) for f, each, share in zip(shares, u, q, strict=True)]
            loss = divergence(u) + weight * torch.stack(spread).sum()
        for each, grad in zip(a, torch.autograd.grad(loss, a), strict=True):
            each.grad = mean_over_processes(grad)
        optimizer.step()
        decay.step()
    return [F.softplus(each.detach()) for each in a]


def fit_share(graph: Graph, config: PruneNetConfig, targets: Sequence[ChannelTarget]) -> Selection:
    """The fewest channels of each group that hold one share theta of its importance, as dear as the goal allows."""
    assert config.goal is not None
    goal, price = config.goal, PRICES[config.goal.name]
    floors = {target.units.name: floor_count(config.min_keep, target.units.units) for target in targets}
    allowance = Allowance(graph, goal)
    require_reachable(goal, price(graph, floors_alone([t.units for t in targets], floors)) / allowance.dense)

    def select(scores: Mapping[str, Tensor], share: float) -> Plan:
        values = {name: score.double().cpu() for name, score in scores.items()}
        return allowance.spend(share, lambda allowed: hold(values, allowed))

    def hold(values: Mapping[str, Tensor], allowed: float) -> Plan:
        cheap, dear = 0.0, 1.0
        for _ in range(50):
            middle = (cheap + dear) / 2
            affordable = price(graph, _holding(values, middle, floors)) <= allowed
            cheap, dear = (middle, dear) if affordable else (cheap, middle)
        return _holding(values, cheap, floors)

    return select


def _holding(values: Mapping[str, Tensor], theta: float, floors: Mapping[str, int]) -> Plan:
    """Of each group the fewest channels whose importance sums to the share `theta`; of equal ones the first."""
    plan = {}
    for name, value in values.items():
        held = value.sort(descending=True).values.cumsum(0) / value.sum()
        needed = int((held < theta).sum()) + 1
        plan[name] = keep_highest([value], max(min(needed, len(value)), floors[name]))[0]
    return plan


def _rectified(observed: Tensor) -> tuple[Tensor, int]:
    return first_moments(observed.clamp(min=0.0))


def _squared_columns(model: nn.Module, target: ChannelTarget) -> Tensor:
    """Squared length of what reads each channel, `(units,)`, over all its readers; ones where no weight does."""
    shapes, total = dict(target.units.shapes), torch.zeros(target.units.units)
    for member in target.units.group.members:
        if member.reads and len(shapes.get(member.tensor, ())) > 1:
            weight = dense_parameter(model, member.tensor).detach().float()
            rows = weight.movedim(member.dim, 0)[unit_indices(member, len(total)).flatten().to(weight.device)]
            total = total.to(rows.device) + rows.reshape(len(total), -1).square().sum(1)
    return total if bool(total.any()) else torch.ones_like(total)


def build(model: nn.Module, graph: Any, config: PruneNetConfig) -> Recipe:
    """A mask on every width that can lose channels exactly; the optimisation runs once, at `begin`."""
    targets = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    like, silence, gates = next(model.parameters()), Silence(model, graph.traced), []
    for target in targets:
        moves = silence.constants_move(target.units.name, target.writers)
        masks = [MeanMask(target.units.units, like, moves) for _ in target.writers]
        gates.append(MeanGate(target, masks, "masks"))
    fit = Fit(model, targets, gates, graph.traced, config)
    return Recipe(
        structures=[target.units for target in targets],
        measured_scores=fit.scores,
        selection=fit_share(graph.traced, config, targets),
        schedule=schedules.one_shot(config.begin),
        gates=gates,
    )


TINY = {
    "flops": PruneNetConfig(target_flops=0.85, begin=0.2, fit_batches=3, variance_batches=2),
    "residual_params": PruneNetConfig(
        target_params=0.6, begin=0.3, fit_batches=2, residual=True, view="own", signal="rectified"
    ),
}
