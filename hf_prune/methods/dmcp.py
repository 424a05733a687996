"""DMCP: channel pruning as a Markov process (Guo et al. 2020, arXiv 2005.03354).

Idea      a width keeps a prefix of its channels: a group of channels stays only if the group before it does, each with
          a learned probability. The expected width, and so the expected cost, is a differentiable function of these
          few numbers, which the task and a budget train while the weights learn to serve every width.
Equations p_k = sigmoid(alpha_k), P_k = p_1 ... p_k, E = least + size * sum_k P_k -> `MarkovWidth`; channel c of group k
          times P_k -> `MarkovWidth.soft`; log|E - T| below 0.95 T, 0 up to T, log|E - 0.95 T| above, T the goal
          -> `Search.budget_loss`; widest net on the task, narrowest and two random ones on its logits
          -> `Search.passes`; final width round(E - 1e-4), or the best of five samples within 1 % -> `Search.select`.
Differs   Built from the authors' code; the paper's equation numbers could not be had. A step of the second half of the
          search trains either the weights or the probabilities, in turn; the authors do both on one batch. Prices are
          shares of the dense price, from our own graph; the factor inside the authors' logarithm far from the goal,
          which has no gradient, is left out. Narrow passes silence channels instead of slicing them: the same values,
          no time saved. The share of uniform draws falls smoothly with progress to what the authors' decay per draw
          comes to. Their sampler of bottlenecks reads another layer's probabilities; ours does not. A common shift of
          all alphas, found by bisection, lands the final widths on the goal exactly; samples are drawn at that shift,
          and the best is the one of lowest loss on the last batch of the search, the expected widths among them. With
          `order="l1"` the prefix follows the sizes of the filters, which for a trained net means something. What is
          left inherits its weights and trains until the end of the run; the authors train it anew. Its rates, and
          label smoothing, are the user's.
Related   `resrep` and `c2s2` choose channels one by one, by what they are worth; here only how many stay is learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_goal, require_range, require_removal
from hf_prune.graph import Graph
from hf_prune.graph.writers import carriers
from hf_prune.parts import schedules
from hf_prune.parts.budgets import require_reachable, share_of_sizes
from hf_prune.parts.channel_gates import (
    ChannelGate,
    ChannelMask,
    ChannelTarget,
    channel_targets,
    passing,
)
from hf_prune.parts.distillation import logits_divergence
from hf_prune.parts.randomness import generator
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.statistics import sum_over_processes
from hf_prune.types import Paper, Phase, Plan, PruneError

PAPER = Paper(
    title="DMCP: Differentiable Markov Channel Pruning for Neural Networks",
    authors="Shaopeng Guo, Yujie Wang, Quanquan Li, Junjie Yan",
    year=2020,
    arxiv="2005.03354",
    status="reconstruction",
    bibtex="""@inproceedings{guo2020dmcp,
  title     = {DMCP: Differentiable Markov Channel Pruning for Neural Networks},
  author    = {Guo, Shaopeng and Wang, Yujie and Li, Quanquan and Yan, Junjie},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2020}
}""",
)
NEEDS_TRAINING = True
GOALS = ("target_flops", "target_params", "target_bytes")
TINY_MODEL = "image"

FINALS = ("expected", "sampled")
ORDERS = ("l1", "natural")


@dataclass(frozen=True)
class DMCPConfig(PruneConfig):
    """Defaults are those of the authors' ResNet-50 run: 20 epochs of weights, 20 of search, 100 of retraining.

    Before `begin` only the weights train, from `begin` to `end` the search alternates, from `end` on the chosen net
    trains alone; that also settles the norms' statistics, which every width has moved. The search of the authors takes
    25,000 steps; one of hundreds needs `alpha_lr` around 5. Train without gradient clipping (`max_grad_norm=0`): it
    would measure the gradients of weights and probabilities together.
    """

    method = "dmcp"

    structure: str = "group"
    begin: float = 20 / 140
    end: float = 40 / 140
    min_keep: float = 0.1  # fraction of the units of each width that always stays, the first of the grid
    width_step: float = 0.1  # fraction of the units of a width in one Markov group
    alpha_lr: float = 0.5  # of the probabilities' own SGD, at the peak of the schedule
    alpha_momentum: float = 0.9  # of that SGD (Nesterov), which has no weight decay
    budget_weight: float = 0.1  # of the budget loss beside the task's
    random_widths: int = 2  # random nets trained in each step, beside the widest and the narrowest
    uniform_share: float = 0.78  # of the random nets at the end of the search, the others are Markov samples
    final: str = "expected"  # "expected": the expected widths; "sampled": the best of Markov samples at that price
    samples: int = 5  # nets to choose from with final="sampled"
    order: str = "l1"  # of the channels in the prefix. "l1": largest filters first; "natural": as they are numbered
    residual: bool = True  # also the widths of residual streams, which share their probabilities

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("global",))
        require_range("end", self.end, 0.0, 1.0, closed_right=False)
        require_range("width_step", self.width_step, 0.0, 1.0, closed_left=False)
        require_range("alpha_lr", self.alpha_lr, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("alpha_momentum", self.alpha_momentum, 0.0, 1.0, closed_left=False, closed_right=False)
        require_range("budget_weight", self.budget_weight, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("random_widths", self.random_widths, 0, math.inf, closed_right=False)
        require_range("uniform_share", self.uniform_share, 0.0, 1.0, closed_left=False)
        require_range("samples", self.samples, 1, math.inf, closed_right=False)
        require_choice("final", self.final, FINALS)
        require_choice("order", self.order, ORDERS)
        require_goal(self, GOALS)
        require_removal(self)


Config = DMCPConfig

_BAND = 0.95  # of the goal: costs between this and the goal are not pushed
_ROUNDING = 1e-4  # a half rounds down
_TOLERANCE = 0.01  # of the goal, for the price of a sample
_FAR = 40.0  # a shift that makes every probability 0 or 1
_TRIES = 2000  # draws in search of samples that cost what the goal says


def width_grid(units: int, least: float, step: float) -> tuple[int, int, int]:
    """Units that always stay, units in a Markov group, number of groups.

    >>> width_grid(64, 0.1, 0.1)
    (10, 6, 9)
    """
    size = max(1, int(step * units + 1e-9))
    groups = min(round((1.0 - least) / step), (units - 1) // size)
    return units - groups * size, size, groups


class MarkovWidth(ChannelMask):
    """The law of how many channels stay, and the channels that do: the first ones in the order of `rank`."""

    rank: Tensor

    def __init__(self, rank: Tensor, like: Tensor, grid: tuple[int, int, int]) -> None:
        """rank: place of each channel in the order of going last, `(C,)`.  grid: see `width_grid`."""
        super().__init__(len(rank), like)
        self.least, self.size, self.groups = grid
        self.alpha = nn.Parameter(torch.zeros(self.groups, dtype=self.dtype, device=like.device))
        self.register_buffer("rank", rank.to(like.device))

    def probabilities(self, shift: float = 0.0) -> Tensor:
        """P_k, that group k stays, `(groups,)`; never rising."""
        return (self.alpha + shift).sigmoid().cumprod(0)

    def expected(self, shift: float = 0.0) -> Tensor:
        """E, the expected number of channels."""
        return self.least + self.size * self.probabilities(shift).sum()

    def soft(self) -> Tensor:
        """P of each channel's group, 1 for those that always stay, `(C,)`."""
        probabilities = torch.cat([self.alpha.new_ones(1), self.probabilities()])
        return probabilities[((self.rank - self.least).div(self.size, rounding_mode="floor") + 1).clamp(min=0)]

    def prefix(self, width: int) -> Tensor:
        """The first `width` channels, bool `(C,)`."""
        return self.rank < width

    @torch.no_grad()
    def walks(self, count: int, source: torch.Generator, shift: float = 0.0) -> Tensor:
        """Widths of `count` walks, each of which ends at the first group that a draw with p_k does not keep."""
        kept = torch.rand(count, self.groups, generator=source) < (self.alpha.cpu() + shift).sigmoid()
        return self.least + self.size * kept.cumprod(1).sum(1)

    def uniform(self, source: torch.Generator) -> int:
        """A width of the grid, each as likely as the others."""
        return self.least + self.size * int(torch.randint(self.groups + 1, (), generator=source))


class Search:
    """Trains weights and probabilities in turn, and chooses the widths: passes, penalty, selection and controller."""

    def __init__(self, gates: Sequence[ChannelGate[MarkovWidth]], graph: Graph, config: DMCPConfig) -> None:
        assert config.goal is not None
        self.gates, self.config, self.goal = gates, config, config.goal
        self.widths = [gate.function for gate in gates]
        self.price = share_of_sizes(graph, self.goal, [gate.name for gate in gates])
        require_reachable(self.goal, self._cost([width.least for width in self.widths]))
        self.progress = 0.0
        self.tried: tuple[float, Tensor] | None = None
        """Progress at which candidates were tried, and the loss of each."""

    def budget_loss(self, progress: float) -> Tensor:
        """How far the expected price is from the goal."""
        expected = torch.stack([width.expected() for width in self.widths])
        price, goal = self.price(expected).to(expected), self.goal.kept(1.0)
        if _BAND * goal <= price < goal:
            return 0.0 * price
        wanted = goal if price < goal else _BAND * goal
        return self.config.budget_weight * (price - wanted).abs().log()

    def phase(self, step: int) -> Phase:
        """Weights up to `begin`, then weights and probabilities in turn, from `end` on the chosen net."""
        names = {f"{gate.writers[0].host}.{gate.kind}.alpha" for gate in self.gates}
        if self.progress >= self.config.end:
            return Phase("tune", lambda name: name not in names, penalties_active=False)
        if self._last(step) and self.config.final == "sampled":
            return Phase("choose", lambda name: name not in names, penalties_active=False)
        if self.progress >= self.config.begin and step % 2:
            return Phase("probabilities", lambda name: name in names)
        return Phase("weights", lambda name: name not in names, penalties_active=False)

    def _last(self, step: int) -> bool:
        """Whether the step that comes next is the last of the search."""
        return step > 0 and self.progress * (step + 1) / step >= self.config.end

    def passes(self, pruner: Any, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The soft net on task and budget, or the sum of the widest net on the task and narrower ones on its logits."""
        phase = pruner.phase.name
        if any(getattr(module, "gradient_checkpointing", False) for module in pruner.model.modules()):
            raise PruneError(
                "gradient checkpointing runs layers again when the width that they had is gone; "
                "set gradient_checkpointing=False for DMCP."
            )
        if phase == "probabilities":
            with passing({width: width.soft() for width in self.widths}):
                outputs = model(**inputs, **pruner.student_inputs)
                return pruner.loss(outputs.loss, outputs, inputs)
        outputs = model(**inputs, **pruner.student_inputs)
        loss = pruner.loss(outputs.loss, outputs, inputs)
        if phase == "tune":
            return loss
        widest = {name: value.detach() for name, value in outputs.items() if isinstance(value, Tensor)}
        for sizes in self._narrower():
            # Not through a wrapper: gradients of one backward are reduced once, for the pass that went through it.
            narrow = self._run(pruner.model, sizes, inputs)
            loss = loss + logits_divergence(narrow, [widest], inputs, temperature=1.0)
        if phase == "choose":
            self._try_candidates(pruner.model, inputs)
        return loss

    def _run(self, model: nn.Module, sizes: Sequence[int], inputs: Mapping[str, Any]) -> Any:
        with passing({width: width.prefix(size) for width, size in zip(self.widths, sizes, strict=True)}):
            return model(**inputs)

    def _narrower(self) -> Iterator[list[int]]:
        """The narrowest net, then random ones, the same for all parts of a batch and all processes."""
        yield [width.least for width in self.widths]
        source = generator(self.config.seed, "widths", repr(self.progress))
        searched = max(self.progress - self.config.begin, 0.0) / (self.config.end - self.config.begin)
        for _ in range(self.config.random_widths):
            if float(torch.rand((), generator=source)) < self.config.uniform_share**searched:
                yield [width.uniform(source) for width in self.widths]
            else:
                yield [int(width.walks(1, source)) for width in self.widths]

    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """Everything until the end of the search, then the chosen widths."""
        if share < 1.0:
            return {gate.name: torch.ones_like(gate.function.keep) for gate in self.gates}
        sizes = self._expected_sizes(self._shift())
        if self.tried is not None:
            candidates = list(self._candidates())
            sizes = candidates[int(sum_over_processes(self.tried[1]).argmin())]
        return {gate.name: gate.function.prefix(size) for gate, size in zip(self.gates, sizes, strict=True)}

    def _cost(self, sizes: Sequence[int]) -> float:
        return float(self.price(torch.tensor(sizes)))

    @torch.no_grad()
    def _sizes(self, shift: float) -> list[int]:
        return [round(float(width.expected(shift)) - _ROUNDING) for width in self.widths]

    def _shift(self) -> float:
        """The largest common shift of all alphas at which the expected widths cost at most what the goal says."""
        allowed, cheap, dear = self.goal.kept(1.0), -_FAR, _FAR
        for _ in range(60):
            middle = (cheap + dear) / 2
            affordable = self._cost(self._sizes(middle)) <= allowed
            cheap, dear = (middle, dear) if affordable else (cheap, middle)
        return cheap

    def _expected_sizes(self, shift: float) -> list[int]:
        """Expected widths at the shift, and one unit more where widths that rose together left room for it."""
        sizes, allowed = self._sizes(shift), self.goal.kept(1.0)
        for place, more in enumerate(self._sizes(shift + 1e-6)):
            raised = [*sizes[:place], max(sizes[place], more), *sizes[place + 1 :]]
            sizes = raised if self._cost(raised) <= allowed else sizes
        return sizes

    def _candidates(self) -> Iterator[list[int]]:
        """The expected widths, and Markov samples whose price is within 1 % of the goal."""
        shift, allowed = self._shift(), self.goal.kept(1.0)
        yield self._expected_sizes(shift)
        source, found = generator(self.config.seed, "candidates"), 0
        for sizes in zip(*(width.walks(_TRIES, source, shift).tolist() for width in self.widths), strict=True):
            if found < self.config.samples and abs(self._cost(sizes) - allowed) <= _TOLERANCE * allowed:
                found += 1
                yield list(sizes)

    @torch.no_grad()
    def _try_candidates(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        losses = torch.stack([self._run(model, sizes, inputs).loss.double() for sizes in self._candidates()])
        before = self.tried[1] if self.tried is not None and self.tried[0] == self.progress else 0.0
        self.tried = (self.progress, before + losses)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Follow the run; a run that starts again forgets what was tried."""
        self.progress = metrics.get("progress", self.progress)
        if self.progress == 0.0:
            self.tried = None

    def state_dict(self) -> dict[str, Any]:
        """Progress; the rest is in the gates, or drawn again from it."""
        return {"progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.progress = state["progress"]


def _rank(model: nn.Module, target: ChannelTarget, order: str) -> Tensor:
    """Place of each channel, `(C,)`, the one that goes last at 0."""
    places = torch.arange(target.units.units)
    if order == "natural":
        return places
    scores = unit_norms(model, [target.units], order=1)()[target.units.name].cpu()
    return torch.empty_like(places).index_copy(0, scores.sort(descending=True, stable=True).indices, places)


def build(model: nn.Module, graph: Any, config: DMCPConfig) -> Recipe:
    """A Markov gate for every width that can lose channels exactly, and the search for the widths."""
    targets = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    like, gates = next(model.parameters()), []
    for target in targets:
        grid = width_grid(target.units.units, config.min_keep, config.width_step)
        width = MarkovWidth(_rank(model, target, config.order), like, grid)
        # Also behind depthwise convolutions, whose own norm would undo a factor on what they read.
        everywhere = replace(target, writers=target.writers + carriers(model, graph.traced, target.units.group))
        gates.append(ChannelGate(everywhere, [width], "alphas"))
    search = Search(gates, graph.traced, config)
    return Recipe(
        structures=[target.units for target in targets],
        selection=search.select,
        schedule=schedules.one_shot(config.end),
        fixed_from=config.end,
        gates=gates,
        penalties={"budget": search.budget_loss},
        controller=search,
        optimizers={
            "alphas": partial(torch.optim.SGD, lr=config.alpha_lr, momentum=config.alpha_momentum, nesterov=True)
        },
        passes=search.passes,
    )


TINY = {
    "flops": DMCPConfig(target_flops=0.5, begin=0.2, end=0.7, min_keep=0.05, width_step=0.06),
    "inner_params_sampled": DMCPConfig(
        target_params=0.6, begin=0.1, end=0.6, final="sampled", order="natural", uniform_share=0.2, residual=False
    ),
}
