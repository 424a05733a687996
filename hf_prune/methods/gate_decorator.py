"""Gate Decorator: channels ranked by what closing their gate would cost (You et al. 2019, arXiv 1909.08174).

Idea      a batch norm's scale becomes a gate phi of its channel. The loss that closing a gate costs is, to first order,
          |phi dL/dphi|; the cheapest channels of all layers go. Tick: only gates and the classifier train, for scores,
          and after each Tick a few channels go. Tock: everything trains, and gates are pulled to zero.
Equations conversion phi (x^ + beta / gamma) with phi = gamma at first -> `NormGate`; score = sum over steps of
          |phi dL/dphi| -> `TickTock.collect`; a group's score = sum over its layers -> `TickTock.scores`; fraction p of
          the channels left goes after each Tick -> `TickTock.prune`; Tock's loss + lambda sum |phi| -> `build`.
Differs   Built from the authors' code, notebooks and issues; the paper's equation numbers could not be had. Where
          |beta / gamma| > 10 the authors clamp it, which changes the function; here the gate of such a channel begins
          at 1 before gamma and beta, which has the same score. The offset stays beta; theirs is beta / gamma. Without
          a norm the gate multiplies the layer's output. |phi dL/dphi| is taken of the gradient of one optimizer step,
          after clipping. A channel that several layers write counts once in the ranking and in p. "Removed: all up to
          the n-th" becomes n exactly. Where p is too small to reach the goal in the Ticks before `end`, each removes an
          equal share of what has to go; the last one lands on the goal, and tuning begins there. Frozen means out of
          the optimizer: in the authors' code convolutions still decay in Tick. Their cost term eta is 0 in all their
          settings and is left out; the momentum of the last tuning is the user's. Steps count where they count epochs:
          the defaults are those of 391 steps. The triangles of the learning rate scale the user's schedule.
Related   `resrep` mixes channels behind the norm and pulls rows to zero; there the ranking is by size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_goal, require_range, require_removal
from hf_prune.graph.writers import LAYERS
from hf_prune.parts import schedules
from hf_prune.parts.budgets import PRICES
from hf_prune.parts.channel_gates import ChannelGate, ChannelScale, ChannelTarget, channel_targets
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.selection import Selection, drop_lowest, dropped, floor_count
from hf_prune.parts.targets import choose_units
from hf_prune.types import Paper, Phase, Plan, PruneError

PAPER = Paper(
    title="Gate Decorator: Global Filter Pruning Method for Accelerating Deep Convolutional Neural Networks",
    authors="Zhonghui You, Kun Yan, Jinmian Ye, Meng Ma, Ping Wang",
    year=2019,
    arxiv="1909.08174",
    status="reconstruction",
    bibtex="""@inproceedings{you2019gate,
  title     = {Gate Decorator: Global Filter Pruning Method for Accelerating Deep Convolutional Neural Networks},
  author    = {You, Zhonghui and Yan, Kun and Ye, Jinmian and Ma, Meng and Wang, Ping},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2019}
}""",
)
NEEDS_TRAINING = True
GOALS = ("target_flops", "target_params", "target_bytes", "target_latency")
TINY_MODEL = "image"

_MOST_OFFSET = 10.0  # of |beta / gamma|, where the authors clamp


@dataclass(frozen=True)
class GateDecoratorConfig(PruneConfig):
    """Defaults are those of the authors' ResNet-56 run on CIFAR-10, whose epochs have 391 steps.

    `tick_steps`, `tock_steps` and `round_fraction` are to be chosen so that the Ticks before `end` reach the goal. The
    method shapes the learning rate by itself, so that a constant schedule suits it.
    """

    method = "gate_decorator"
    rounds_widths = True

    structure: str = "group"
    end: float = 0.86  # 16 Tocks and 153 Ticks of 363 epochs; the rest is tuning
    min_keep: float = 0.1
    tick_steps: int = 391  # optimizer steps of a Tick, after which channels go
    tock_steps: int = 3910  # optimizer steps of a Tock
    ticks_per_tock: int = 10  # T, Ticks between two Tocks
    round_fraction: float = 0.002  # p, of the channels left, that goes after each Tick
    sparsity_weight: float = 1e-3  # lambda, the pull at every gate in Tocks
    gate_lr: float = 1e-2  # of the gates' own SGD, at the peak of the schedule
    gate_momentum: float = 0.9  # of that SGD
    gate_weight_decay: float = 5e-4  # of that SGD
    lr_floor: float = (
        0.1  # share of the learning rate in Ticks, and from which Tocks and tuning rise and to which they fall
    )
    residual: bool = True  # also prune residual streams, with a gate in each layer that adds into one

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("global",))
        for name in ("tick_steps", "ticks_per_tock"):
            require_range(name, getattr(self, name), 1, math.inf, closed_right=False)
        for name in ("tock_steps", "sparsity_weight", "gate_weight_decay"):
            require_range(name, getattr(self, name), 0, math.inf, closed_right=False)
        require_range("round_fraction", self.round_fraction, 0.0, 1.0, closed_right=False)
        require_range("gate_lr", self.gate_lr, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("gate_momentum", self.gate_momentum, 0.0, 1.0, closed_right=False)
        require_range("lr_floor", self.lr_floor, 0.0, 1.0, closed_left=False)
        require_goal(self, GOALS)
        require_removal(self)


Config = GateDecoratorConfig


class NormGate(ChannelScale):
    """phi, `(C,)`: takes the place of a norm's gamma, which rests meanwhile; 1 at first where there is none."""

    origin: Tensor
    taylor: Tensor

    def __init__(self, channels: int, like: Tensor, norm: Any = None) -> None:
        super().__init__(channels, like)
        origin = torch.ones_like(self.scale.detach())
        if norm is not None and norm.affine:
            gamma, beta = norm.weight.detach().to(origin), norm.bias.detach().to(origin)
            origin = torch.where((gamma != 0) & (beta.abs() <= _MOST_OFFSET * gamma.abs()), gamma, origin)
        self.scale.data.copy_(origin)
        self.register_buffer("origin", origin)
        self.register_buffer("taylor", torch.zeros_like(origin))

    def factor(self) -> Tensor:
        """phi in units of gamma, where kept."""
        return torch.where(self.keep, self.scale / self.origin, 0.0)


@dataclass(frozen=True)
class Timetable:
    """Tock and Tick by optimizer step: from `first` on a Tock and `ticks` Ticks, over and over until `last`."""

    first: int
    last: int
    tick: int
    tock: int
    ticks: int

    @property
    def cycle(self) -> int:
        """Steps of a Tock and the Ticks behind it."""
        return self.tock + self.ticks * self.tick

    def rounds(self, step: int) -> int:
        """Ticks that have ended after `step` steps."""
        cycles, steps = divmod(max(min(step, self.last) - self.first, 0), self.cycle)
        return cycles * self.ticks + max(steps - self.tock, 0) // self.tick

    def tock_share(self, step: int) -> float | None:
        """How far in its Tock the step that comes after `step` steps is; None in a Tick."""
        place = (step - self.first) % self.cycle
        return (place + 0.5) / self.tock if place < self.tock else None


class TickTock:
    """Collects the scores, prunes after each Tick, and says what trains: the run's controller."""

    def __init__(
        self,
        gates: Sequence[ChannelGate[NormGate]],
        cheapest: Selection,
        within_goal: Callable[[Plan], bool],
        in_tick: frozenset[str],
        config: GateDecoratorConfig,
    ) -> None:
        """cheapest: the highest scores that fit the goal.  within_goal: whether a plan costs no more than the goal.
        in_tick: names of the parameters that train in Ticks.
        """
        self.gates, self.cheapest, self.within_goal, self.config = gates, cheapest, within_goal, config
        self.in_tick = in_tick
        self.floors = {gate.name: floor_count(config.min_keep, len(gate.keep())) for gate in gates}
        self.step = self.total = 0
        self.reached: int | None = None  # steps after which the goal was reached

    @property
    def timetable(self) -> Timetable:
        """Of the run as long as it is."""
        c = self.config
        first, last = math.ceil(c.begin * self.total - 1e-9), math.floor(c.end * self.total + 1e-9)
        return Timetable(first, last, c.tick_steps, c.tock_steps, c.ticks_per_tock)

    def phase(self, step: int) -> Phase:
        """Tock (or what comes before `begin`), Tick, tuning."""
        table, floor = self.timetable, self.config.lr_floor
        if self.reached is not None:
            share = (step - self.reached + 0.5) / max(self.total - self.reached, 1)
            return Phase("tune", penalties_active=False, lr_scale=_triangle(share, floor))
        if step < table.first:
            return Phase("train", penalties_active=False)
        share_of_tock = table.tock_share(step)
        if share_of_tock is None:
            return Phase("tick", self.in_tick.__contains__, penalties_active=False, lr_scale=floor)
        return Phase("tock", lr_scale=_triangle(share_of_tock, floor))

    def collect(self, function: NormGate, grad: Tensor) -> Tensor:
        """Add |phi dL/dphi| of one optimizer step, in Ticks; the gradient stays as it is."""
        if self.phase(self.step).name == "tick":
            function.taylor += (function.scale.detach() * grad).abs()
        return grad

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Prune where a Tick has ended."""
        if "step" not in metrics:
            return
        self.step, self.total = int(metrics["step"]), int(metrics["total_steps"])
        table = self.timetable
        if self.step == 0:  # also of a run that starts again
            self.reached = None
            self._require_a_round(table)
        if self.reached is None and table.rounds(self.step) > table.rounds(self.step - 1):
            self.prune(table.rounds(table.last) - table.rounds(self.step) + 1)

    def _require_a_round(self, table: Timetable) -> None:
        if table.rounds(table.last) == 0:
            raise PruneError(
                f"no Tick ends between begin={self.config.begin} and end={self.config.end} of {self.total} optimizer "
                f"steps: a Tock of {table.tock} steps and a Tick of {table.tick} do not fit into "
                f"{max(table.last - table.first, 0)}. Lower tock_steps and tick_steps, or train longer."
            )

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Sum of what each layer of the group has collected; channels that are gone rank below all others."""
        sums = {gate.name: sum(f.taylor for f in gate.functions) for gate in self.gates}
        return {gate.name: torch.where(gate.keep(), sums[gate.name], -1.0) for gate in self.gates}

    @torch.no_grad()
    def prune(self, rounds_left: int) -> None:
        """Fraction p of the channels left, or as many as the goal needs by the last round; scores start anew."""
        scores, now = self.scores(), {gate.name: gate.keep() for gate in self.gates}
        wanted, gone = self.cheapest(scores, 1.0), dropped(now)
        left = sum(map(len, now.values())) - gone
        quota = max(int(self.config.round_fraction * left), math.ceil((dropped(wanted) - gone) / rounds_left))
        plan = drop_lowest(scores, gone + quota, self.floors)
        if self.within_goal(plan) or rounds_left == 1:
            plan, self.reached = wanted, self.step
        for gate in self.gates:
            gate.set_keep(plan[gate.name])
            for function in gate.functions:
                function.taylor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; scores and masks are in the gates."""
        return {"step": self.step, "total": self.total, "reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.step, self.total, self.reached = state["step"], state["total"], state["reached"]


def _triangle(share: float, floor: float) -> float:
    """`floor` at both ends, 1 in the middle."""
    return floor + (1.0 - floor) * (1.0 - abs(2.0 * share - 1.0))


def _gate(model: nn.Module, target: ChannelTarget) -> ChannelGate[NormGate]:
    """A gate in every layer that writes the group: each has scales of its own."""
    like = next(model.parameters())
    norms = [model.get_submodule(writer.norm) if writer.norm else None for writer in target.writers]
    return ChannelGate(target, [NormGate(target.units.units, like, norm) for norm in norms])


def _in_tick(model: nn.Module, gates: Sequence[ChannelGate[NormGate]]) -> frozenset[str]:
    """Gates, the offsets of gated norms, and the last layer: what trains while scores are collected."""
    hosts = [writer for gate in gates for writer in gate.writers]
    last = [name for name, module in model.named_modules() if isinstance(module, LAYERS)][-1]
    head = {f"{last}.{name}" for name, _ in model.get_submodule(last).named_parameters()}
    return frozenset(head | {f"{w.host}.gates.scale" for w in hosts} | {f"{w.norm}.bias" for w in hosts if w.norm})


def build(model: nn.Module, graph: Any, config: GateDecoratorConfig) -> Recipe:
    """A gate for every width that can lose channels exactly, and Tick-Tock up to `end`."""
    goal = config.goal
    assert goal is not None
    targets = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    gates, units = [_gate(model, target) for target in targets], [target.units for target in targets]
    functions = [function for gate in gates for function in gate.functions]
    traced, price = graph.traced, PRICES[goal.name]
    allowed = goal.value * price(traced, None)
    cheapest = choose_units(graph, units, config)
    tick_tock = TickTock(gates, cheapest, lambda plan: price(traced, plan) <= allowed, _in_tick(model, gates), config)
    sgd = partial(
        torch.optim.SGD, lr=config.gate_lr, momentum=config.gate_momentum, weight_decay=config.gate_weight_decay
    )
    return Recipe(
        structures=units,
        schedule=schedules.linear(config.begin, config.end),
        gates=gates,
        penalties={
            "gates": lambda progress: (
                config.sparsity_weight * torch.stack([f.scale.abs().sum() for f in functions]).sum()
            )
        },
        transforms={function.scale: partial(tick_tock.collect, function) for function in functions},
        controller=tick_tock,
        optimizers={"gates": sgd},
        frozen=[f"{writer.norm}.weight" for target in targets for writer in target.writers if writer.norm],
    )


TINY = {
    "params": GateDecoratorConfig(target_params=0.7, end=0.8, tock_steps=2, tick_steps=1, ticks_per_tock=2),
    "flops": GateDecoratorConfig(
        target_flops=0.8, end=0.9, tock_steps=1, tick_steps=2, ticks_per_tock=1, residual=False, round_fraction=0.1
    ),
}
