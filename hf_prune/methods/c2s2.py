"""C2S2: layer by layer, as many channels as a performance budget allows (Chiu, Chen, Liu 2019, arXiv 1904.03508).

Idea      a pruning layer of one number a channel is put behind each layer of a trained net, in two forms: real numbers
          that a sparsity criterion trains, and the binary mask that they make. Layers are handled one after the other:
          select with everything else frozen, check on data what the mask costs, adapt the weights under it, go on.
Equations y = v x, loss + rho sum v + kappa sum v (1 - v), v in [0, 1] -> `Layerwise.penalty`, `Layerwise.clip`;
          b = 1[v > t] -> `Layerwise._judge`; accepted while loss(b) - loss(ones) <= tau_l, tau_l the layer's part of
          tau_total by multiply-adds, with what earlier layers left -> `Layerwise._allowance`.
Differs   Only the abstract could be had, and it was looked for again: pruning layers of 1 x 1 depth-wise kernels in a
          real and a binary form, two phases, layer by layer, a sparsity criterion, a cost-aware mechanism that guards
          performance. Every formula above, every default, and whatever else is here is a reconstruction, to be called
          C2S2-style. In particular: where a mask costs too much, the fewest channels of highest v come back, found by
          bisection; where it does not, rho doubles and the layer is selected again, `rounds` times at most; norms and
          dropout are in evaluation mode while v trains, v trains at a constant rate, and is dropped once the mask
          stands. A goal in multiply-adds, parameters or bytes is ours: selection stops once it is reached, and a
          budget that stops it before raises an error. `PruneTrainer` has the guard read training rows;
          `Pruner(data=...)` takes rows that were held out.
Related   `gate_decorator` gates all layers at once; `magnitude` ranks without looking at what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range, require_removal
from hf_prune.graph import Graph
from hf_prune.graph.trace import evaluating
from hf_prune.parts.budgets import PRICES, require_reachable
from hf_prune.parts.channel_gates import ChannelGate, ChannelMask, channel_targets, passing
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.selection import floor_count, keep_highest
from hf_prune.parts.statistics import Batch, Calibration, mean_over_processes
from hf_prune.types import Paper, Phase, Plan, PruneError

PAPER = Paper(
    title="C2S2: Cost-aware Channel Sparse Selection for Progressive Network Pruning",
    authors="Chih-Yao Chiu, Hwann-Tzong Chen, Tyng-Luh Liu",
    year=2019,
    arxiv="1904.03508",
    status="reconstruction",
    bibtex="""@article{chiu2019c2s2,
  title   = {C2S2: Cost-aware Channel Sparse Selection for Progressive Network Pruning},
  author  = {Chiu, Chih-Yao and Chen, Hwann-Tzong and Liu, Tyng-Luh},
  journal = {arXiv preprint arXiv:1904.03508},
  year    = {2019}
}""",
)
NEEDS_TRAINING = True
GOALS = ("target_flops", "target_params", "target_bytes")
TINY_MODEL = "image"

ORDERS = ("input", "flops")
FORMS = ("real", "straight_through")


@dataclass(frozen=True)
class C2S2Config(PruneConfig):
    """Defaults suit runs in which a layer has some 200 steps of selection and an epoch of adaptation.

    Selection moves a gate by at most `gate_lr` in a step, so that half the way to 0 takes 0.5 / `gate_lr` steps; short
    runs need a larger rate. Where a goal, not the guard, ends the selection, channels are ranked by how far their gates
    fall: a `sparsity_weight` above the task's gradient at most gates makes all of them fall alike, and no
    `polar_weight` should part them. `tau_total` bounds the sum of all rises of the loss at the moment of each cut;
    adaptation then takes some of them back. Give the guard rows that were neither trained nor tested on.
    """

    method = "c2s2"

    structure: str = "group"
    end: float = 0.6  # share of the steps at which the last layer is done; the rest trains what is left
    min_keep: float = 0.05
    tau_total: float = 0.01  # rise of the loss that all layers together may cost, as a share of the dense model's
    guard_batches: int = 20  # batches of data that the rise is measured on, always the same
    select_share: float = 0.5  # share of a layer's steps in which its gates train; the others adapt the weights
    rounds: int = 3  # selections of one layer at most, each with twice the sparsity weight
    gate_lr: float = 1e-2  # of the gates' own Adam, constant
    sparsity_weight: float = 1e-2  # rho, in a layer's first round
    polar_weight: float = 1e-1  # kappa at the end of a layer's selection, from 0; drives gates to 0 and 1
    threshold: float = 0.5  # t, above which a gate stays
    order: str = "input"  # "input": from input to output; "flops": the layer with most multiply-adds first
    form: str = "real"  # of the gates in selection. "real": v; "straight_through": 1[v > t], with the gradient of v
    residual: bool = False  # also residual streams, one gate shared by all layers that add into one

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("global",))
        require_choice("order", self.order, ORDERS)
        require_choice("form", self.form, FORMS)
        require_range("tau_total", self.tau_total, 0.0, math.inf, closed_right=False)
        require_range("guard_batches", self.guard_batches, 1, math.inf, closed_right=False)
        require_range("select_share", self.select_share, 0.0, 1.0, closed_left=False, closed_right=False)
        require_range("rounds", self.rounds, 1, math.inf, closed_right=False)
        require_range("gate_lr", self.gate_lr, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("sparsity_weight", self.sparsity_weight, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("polar_weight", self.polar_weight, 0.0, math.inf, closed_right=False)
        require_range("threshold", self.threshold, 0.0, 1.0, closed_left=False, closed_right=False)
        require_removal(self)


Config = C2S2Config

_ROUNDING = 1e-6  # of the dense loss: what sums of other order may differ by
_TOLERANCE = 1.01  # of the goal, within which it counts as met
_STATE = ("progress", "guards", "dense_loss", "finished", "rises")


class PruningLayer(ChannelMask):
    """One number v a channel, which counts in selection alone; its binary form is the plan's `keep`."""

    def __init__(self, channels: int, like: Tensor, config: C2S2Config) -> None:
        super().__init__(channels, like)
        self.config = config
        self.scale = nn.Parameter(torch.ones(channels, dtype=self.dtype, device=like.device))

    def selected(self) -> Tensor:
        """What selection multiplies by: v, or its binary form with the gradient of v."""
        if self.config.form == "real":
            return self.scale
        return (self.scale > self.config.threshold).to(self.dtype) + self.scale - self.scale.detach()


class SteadyAdam(torch.optim.Adam):
    """Adam whose rate no schedule changes: a layer that is selected late must not be selected slowly."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.steady = lr

    def step(self, closure: Any = None) -> Any:
        """One step at the rate given at first."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = self.steady
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class Layerwise:
    """Handles the layers in turn: passes, penalty, guard, selection and controller in one.

    Each layer has an equal stretch of the steps between `begin` and `end`: rounds of selection, with a guard at the end
    of each, then adaptation.
    """

    def __init__(self, gates: Sequence[ChannelGate[PruningLayer]], graph: Graph, config: C2S2Config) -> None:
        self.config, self.graph = config, graph
        floors = {gate.name: floor_count(config.min_keep, len(gate.function.keep)) for gate in gates}
        costs = {gate.name: self._saved(gate, floors[gate.name]) for gate in gates}
        order = {"input": list(gates), "flops": sorted(gates, key=lambda gate: -costs[gate.name])}
        self.gates = order[config.order]
        self.floors = [floors[gate.name] for gate in self.gates]
        self.shares = [costs[gate.name] / sum(costs.values()) for gate in self.gates]
        self.progress, self.guards, self.dense_loss = 0.0, 0, 0.0
        self.finished = [False] * len(self.gates)
        self.rises = [0.0] * len(self.gates)
        if config.goal is not None:
            least = {name: torch.arange(len(keep)) < floors[name] for name, keep in self._plan().items()}
            require_reachable(config.goal, self._reached(least))

    def _saved(self, gate: ChannelGate[PruningLayer], floor: int) -> float:
        """Multiply-adds that the layer would save at its floor."""
        keep = torch.arange(len(gate.function.keep)) < floor
        return self.graph.price().multiply_adds - self.graph.price({gate.name: keep}).multiply_adds

    def _place(self, progress: float) -> float:
        """How many layers' stretches have gone by."""
        config = self.config
        return len(self.gates) * (progress - config.begin) / (config.end - config.begin)

    def schedule(self, progress: float) -> float:
        """Share of the guards that are due."""
        place, rounds = self._place(progress) + 1e-9, self.config.rounds
        if place < 0:
            return 0.0
        layer = min(int(place), len(self.gates))
        inside = int((place - layer) / self.config.select_share * rounds)
        return min((layer * rounds + min(inside, rounds)) / (len(self.gates) * rounds), 1.0)

    def phase(self, step: int) -> Phase:
        """Selection of one layer's gates, or adaptation of the weights."""
        layer, names = self._selecting(), [f"{gate.writers[0].host}.{gate.kind}.scale" for gate in self.gates]
        if layer is None:
            return Phase("adapt", lambda name: name not in names, penalties_active=False)
        return Phase("select", lambda name: name == names[layer])

    def _selecting(self) -> int | None:
        place = self._place(self.progress)
        layer = math.floor(place + 1e-9)
        if not 0 <= layer < len(self.gates) or place + 1e-9 - layer >= self.config.select_share:
            return None
        return None if self.finished[layer] or self._goal_reached(self._plan()) else layer

    def passes(self, pruner: Any, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """One pass: with the real form of one layer and norms at rest, or with all binary forms."""
        layer = self._selecting()
        if layer is None:
            outputs = model(**inputs, **pruner.student_inputs)
        else:
            function = self.gates[layer].function
            with evaluating(pruner.model), passing({function: function.selected()}):
                outputs = model(**inputs, **pruner.student_inputs)
        return pruner.loss(outputs.loss, outputs, inputs)

    def penalty(self, progress: float) -> Tensor:
        """Sparsity and polarisation of the layer that is being selected."""
        layer = self._selecting()
        if layer is None:
            return self.gates[0].function.scale.new_zeros(())
        v, place = self.gates[layer].function.scale, self._place(progress) - layer
        rho = self.config.sparsity_weight * 2.0 ** (self.guards - layer * self.config.rounds)
        kappa = self.config.polar_weight * min(place / self.config.select_share, 1.0)
        return rho * v.sum() + kappa * (v * (1.0 - v)).sum()

    @torch.no_grad()
    def clip(self) -> None:
        """Keep every v in [0, 1]."""
        for gate in self.gates:
            gate.function.scale.clamp_(0.0, 1.0)

    def guard(self, calibration: Calibration) -> dict[str, Tensor]:
        """1 for channels that stay, 0 for those that go, after judging the layer whose round has ended."""
        layer, plan = self.guards // self.config.rounds, self._plan()
        self.guards += 1
        if not (self.finished[layer] or self._goal_reached(plan)):
            batches = list(calibration.batches(self.config.guard_batches))
            plan[self.gates[layer].name] = self._judge(layer, lambda: _loss(calibration.model, batches))
        return {name: keep.float() for name, keep in plan.items()}

    @torch.no_grad()
    def _judge(self, layer: int, loss: Callable[[], float]) -> Tensor:
        """The channels of highest v that stay: as few as v, the goal and the guard allow."""
        function = self.gates[layer].function
        before, v = function.keep.clone(), function.scale.masked_fill(~function.keep, -1.0)

        def loss_with(keep: Tensor) -> float:
            function.keep.copy_(keep)
            try:
                return loss()
            finally:
                function.keep.copy_(before)

        ones = loss_with(torch.ones_like(before))
        self.dense_loss = self.dense_loss or ones
        allowed = self._allowance(layer) + _ROUNDING * self.dense_loss
        wanted = max(int((v > self.config.threshold).sum()), self._fewest(layer, v))
        passes, fails, count = int(before.sum()), wanted - 1, wanted
        while fails + 1 < passes:
            rise = loss_with(keep_highest([v], count)[0]) - ones
            if rise <= allowed:
                passes, self.rises[layer] = count, rise
            else:
                fails = count
            count = (fails + passes) // 2
        self.finished[layer] = passes > wanted or passes == self.floors[layer]
        return keep_highest([v], passes)[0]

    def _allowance(self, layer: int) -> float:
        """What the layer may cost: the part of all layers so far, less what those before it took."""
        part = self.config.tau_total * self.dense_loss * sum(self.shares[: layer + 1])
        return part - sum(max(rise, 0.0) for rise in self.rises[:layer])

    def _fewest(self, layer: int, v: Tensor) -> int:
        """Most channels of the layer with which the goal is met, or its floor where it cannot be met by this layer."""
        fewest, too_dear = self.floors[layer], len(v) + 1
        while self.config.goal is not None and too_dear - fewest > 1:
            middle = (fewest + too_dear) // 2
            reached = self._goal_reached({**self._plan(), self.gates[layer].name: keep_highest([v], middle)[0]})
            fewest, too_dear = (middle, too_dear) if reached else (fewest, middle)
        return fewest

    def _plan(self) -> Plan:
        return {gate.name: gate.function.keep.clone() for gate in self.gates}

    def _reached(self, plan: Plan) -> float:
        """Share of the dense price, in the goal's unit."""
        assert self.config.goal is not None
        price = PRICES[self.config.goal.name]
        return price(self.graph, plan) / price(self.graph, None)

    def _goal_reached(self, plan: Plan) -> bool:
        return self.config.goal is not None and self._reached(plan) <= self.config.goal.value

    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """What the guard let through.

        Raises:
            PruneError: there are fewer steps than rounds, or the budget ended before the goal.
        """
        if self.guards != round(share * len(self.gates) * self.config.rounds):
            raise PruneError(
                f"{len(self.gates)} layers with {self.config.rounds} rounds of selection each need more optimizer "
                "steps: two rounds fell into one. Train longer, lower rounds, or prune fewer layers (include)."
            )
        plan, goal = {name: score > 0.5 for name, score in scores.items()}, self.config.goal
        if share >= 1.0 and goal is not None and self._reached(plan) > _TOLERANCE * goal.value:
            raise PruneError(
                f"tau_total={self.config.tau_total} stopped the selection at {self._reached(plan):.3f} of the dense "
                f"price, {goal.name}={goal.value} was asked for. Raise tau_total, select longer (gate_lr, "
                "sparsity_weight, rounds, more steps), or raise the goal."
            )
        return plan

    def record(self) -> dict[str, Any]:
        """What the guard measured: the loss before the first cut, and what each layer's mask added to it."""
        rises = {gate.name: rise for gate, rise in zip(self.gates, self.rises, strict=True)}
        return {"loss_before": self.dense_loss, "loss_rises": rises}

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Follow the run; a run that starts again handles all layers again."""
        self.progress = metrics.get("progress", self.progress)
        if self.progress == 0.0:
            self.guards, self.dense_loss = 0, 0.0
            self.finished, self.rises = [False] * len(self.gates), [0.0] * len(self.gates)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is and what the layers have cost; masks are in the gates."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in _STATE:
            setattr(self, name, state[name])


def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean loss of the batches, over all processes."""
    losses = [model(**batch).loss for batch in batches]
    if any(loss is None for loss in losses):
        raise PruneError("the guard measures the loss on the calibration data, which has no labels; add them.")
    return float(mean_over_processes(torch.stack([loss.double() for loss in losses]).mean()))


def build(model: nn.Module, graph: Any, config: C2S2Config) -> Recipe:
    """A pruning layer for every width that can lose channels exactly, handled one after the other."""
    targets = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    like = next(model.parameters())
    gates = [ChannelGate(target, [PruningLayer(target.units.units, like, config)]) for target in targets]
    layerwise = Layerwise(gates, graph.traced, config)
    return Recipe(
        structures=[target.units for target in targets],
        measured_scores=layerwise.guard,
        selection=layerwise.select,
        schedule=layerwise.schedule,
        gates=gates,
        penalties={"gates": layerwise.penalty},
        projections=[layerwise.clip],
        controller=layerwise,
        optimizers={"gates": partial(SteadyAdam, lr=config.gate_lr)},
        passes=layerwise.passes,
        record=layerwise.record,
    )


TINY = {
    "tolerance": C2S2Config(
        tau_total=0.5, end=0.8, rounds=1, select_share=0.5, gate_lr=0.4, sparsity_weight=1.0, polar_weight=0.0
    ),
    "goal": C2S2Config(
        target_params=0.85, tau_total=5.0, rounds=2, end=0.8, select_share=0.9, gate_lr=0.4, sparsity_weight=1.0,
        form="straight_through", order="flops",
    ),
}  # fmt: skip
