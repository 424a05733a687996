"""Play and Prune: filters go as long as accuracy stays within a tolerance (Singh et al. 2019, arXiv 1905.04446).

Idea      two players. Adaptive filter pruning (AFP) pulls the least filters of each layer to zero and removes those
          that fall below a threshold; the pruning rate controller (PRC) measures what is left and sets pull and
          threshold by how much of the tolerance is unused. Where it is used up, AFP is plain training, accuracy comes
          back, and pruning goes on. The user sets the tolerance; how much goes follows.
Equations slack T = max(0, A - (E - eps)); lambda = T lambda_0; W = delta_w T W_gamma -> `PlayAndPrune.set_pressure`;
          loss + lambda |U|_1 over the unimportant filters U alone -> `PlayAndPrune.pull`; U = the lowest alpha of each
          layer by sum |w| -> `PlayAndPrune.split`.
Differs   Only the abstract, an introduction and one caption could be read, which name lambda_t, W_t and the two
          players; all formulas are a reconstruction. T is taken in units of eps, at most 1. W_gamma is the
          `threshold_quantile` of a layer's norms, measured with A. E is the metric at `begin`. A metric below
          E - eps stops the pull until it is back; after `patience` such iterations, and at the end of the run, model
          and optimizer return to the last state that was within the tolerance, and pull and threshold are halved from
          there on. Filters that several layers write together are judged by all of these layers' weights. Removed
          units are masked, with everything that reads them, and cut once at the end, which is the same. Iterations
          count steps where the authors count epochs. lambda sign(w) is added to the gradient after clipping.
Related   `magnitude` ranks by the same norms, with an amount to remove in place of a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.parts import schedules, structures
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.prunable import prunable_groups
from hf_prune.parts.recipe import GuardedRun, Recipe
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.selection import floor_count, keep_highest
from hf_prune.parts.structures import GroupUnits
from hf_prune.types import Paper, Phase, PruneError

PAPER = Paper(
    title="Play and Prune: Adaptive Filter Pruning for Deep Model Compression",
    authors="Pravendra Singh, Vinay Kumar Verma, Piyush Rai, Vinay P. Namboodiri",
    year=2019,
    arxiv="1905.04446",
    status="reconstruction",
    bibtex="""@inproceedings{singh2019play,
  title     = {Play and Prune: Adaptive Filter Pruning for Deep Model Compression},
  author    = {Singh, Pravendra and Verma, Vinay Kumar and Rai, Piyush and Namboodiri, Vinay P.},
  booktitle = {International Joint Conference on Artificial Intelligence},
  pages     = {3460--3466},
  year      = {2019}
}""",
)
NEEDS_TRAINING = True
GOALS = ("max_metric_drop",)
TINY_MODEL = "image"

_ROUNDING = 1e-9  # 0.9 - 0.01 is a little more than 0.89


@dataclass(frozen=True)
class PlayAndPruneConfig(PruneConfig):
    """`max_metric_drop` is the tolerance, in the metric's own unit: 0.01 of an accuracy in [0, 1] is one point.

    The metric is measured on the validation rows after every iteration, so these must not be the ones that the result
    is reported on, and the tolerance should be two of its standard errors or more.
    """

    method = "play_and_prune"

    structure: str = "group"
    scope: str = "per_group"
    end: float = 0.8  # share of the optimizer steps after which nothing more goes; the rest is plain training
    min_keep: float = 0.05
    metric: str = "accuracy"  # its name among the evaluation's metrics, with or without "eval_"
    higher_is_better: bool = True  # False for a loss
    iteration_steps: int = 782  # optimizer steps between two measurements: two epochs of 391
    unimportant: float = 0.1  # alpha, the fraction of each layer's filters that is pulled, and may go, in an iteration
    lasso_weight: float = 5e-4  # lambda_0, the pull where the whole tolerance is left
    threshold_quantile: float = 0.05  # of a layer's norms: W_gamma, below which filters go
    acceleration: float = 1.0  # delta_w, factor on the threshold
    patience: int = 3  # iterations below the tolerance after which the run returns to the last state within it
    idle_iterations: int = 5  # K, iterations within the tolerance without a filter to go, after which pruning ends
    residual: bool = False  # also prune residual streams

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("per_group",))
        for name in ("iteration_steps", "idle_iterations"):
            require_range(name, getattr(self, name), 1, math.inf, closed_right=False)
        require_range("patience", self.patience, 0, math.inf, closed_right=False)
        require_range("unimportant", self.unimportant, 0.0, 1.0, closed_left=False)
        require_range("threshold_quantile", self.threshold_quantile, 0.0, 1.0, closed_left=False)
        require_range("lasso_weight", self.lasso_weight, 0.0, math.inf, closed_right=False)
        require_range("acceleration", self.acceleration, 0.0, math.inf, closed_left=False, closed_right=False)
        if self.max_metric_drop is None:
            raise ValueError("PlayAndPruneConfig needs max_metric_drop, the most that the metric may lose.")


Config = PlayAndPruneConfig


@dataclass
class _State:
    """Where the game stands; plain numbers and tensors, saved with the run."""

    step: int = 0
    total: int = 0
    reference: float | None = None
    """E."""
    slack: float = 0.0
    """T of the last state within the tolerance, in units of eps."""
    pace: float = 1.0
    """Halved each time the run returns to an older state."""
    pressure: float = 0.0
    """What lambda_0 and the thresholds are multiplied by in this iteration."""
    below: int = 0
    idle: int = 0
    finished: bool = False
    thresholds: dict[str, float] = field(default_factory=dict)
    """W of each group."""
    unimportant: dict[str, Tensor] = field(default_factory=dict)
    """U: bool, `(units,)`."""
    trajectory: list[list[float]] = field(default_factory=list)
    """Steps, metric, units left, at each measurement and each return."""
    good: tuple[float, float] = (0.0, 0.0)
    """Metric and units of the last state within the tolerance."""


class PlayAndPrune:
    """Both players: which filters are pulled and which go, and how strongly; the run's controller."""

    def __init__(self, model: nn.Module, gates: Sequence[MaskGate], config: PlayAndPruneConfig) -> None:
        self.gates, self.config = gates, config
        self.norms = unit_norms(model, [gate.structure for gate in gates], order=1)
        self.floors = {gate.name: floor_count(config.min_keep, gate.structure.units) for gate in gates}
        self.state = _State()

    def phase(self, step: int) -> Phase:
        """Everything trains; the name says who plays."""
        if self.state.finished:
            return Phase("tune")
        return Phase("recover" if self.state.below else "prune")

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Follow the steps; evaluations that the run makes for itself are not looked at."""
        if "step" not in metrics:
            return
        if metrics["step"] == 0:  # also of a run that starts again
            self.state = _State()
        self.state.step, self.state.total = int(metrics["step"]), int(metrics["total_steps"])

    @torch.no_grad()
    def review(self, run: GuardedRun) -> None:
        """After each iteration: AFP removes, PRC measures and sets what comes next."""
        state, config = self.state, self.config
        first = math.ceil(config.begin * state.total - _ROUNDING)
        if state.step < first:
            return
        if state.reference is None:
            state.reference = self._measure(run)
            self.judge(state.reference, run)
        elif (state.step - first) % config.iteration_steps == 0 or state.step == state.total:
            if not state.finished and state.step < state.total:
                state.idle = 0 if self._remove() else state.idle + (not state.below)
            self.judge(self._measure(run), run)
        else:
            return
        late = state.step >= config.end * state.total - _ROUNDING
        state.finished |= late or state.idle >= config.idle_iterations
        self.set_pressure()
        self.split()

    def _measure(self, run: GuardedRun) -> float:
        metrics, name = run.evaluate(), self.config.metric
        value = metrics.get(name, metrics.get(f"eval_{name}"))
        if value is None:
            raise PruneError(
                f"the evaluation gives no metric {name!r}, only {', '.join(sorted(metrics))}; set metric to one of "
                "these, or give PruneTrainer compute_metrics (hf_prune.metrics.compute_metrics_for)."
            )
        if not math.isfinite(value):
            raise PruneError(f"the metric {name!r} is {value}, which no tolerance can be kept with.")
        self.state.trajectory.append([self.state.step, float(value), self._left()])
        return float(value)

    def _left(self) -> int:
        return sum(int(gate.keep().sum()) for gate in self.gates)

    def judge(self, value: float, run: GuardedRun) -> None:
        """Within the tolerance: remember the state. Below it: recover, and return to that state if that fails."""
        state, config = self.state, self.config
        room = self.room(value)
        if room >= -_ROUNDING:
            state.slack, state.below, state.good = self.scaled(room), 0, (value, self._left())
            run.snapshot()
            return
        state.below += 1
        if state.below > config.patience or state.step == state.total:
            run.rollback()
            state.below, state.idle, state.pace = 0, state.idle + 1, state.pace / 2
            state.trajectory.append([state.step, *state.good])

    def room(self, value: float) -> float:
        """A - (E - eps); the other way round where lower is better."""
        assert self.state.reference is not None and self.config.max_metric_drop is not None
        gained = value - self.state.reference
        return (gained if self.config.higher_is_better else -gained) + self.config.max_metric_drop

    def scaled(self, room: float) -> float:
        """T in units of eps, in [0, 1]."""
        eps = self.config.max_metric_drop
        return min(max(room, 0.0) / eps, 1.0) if eps else 1.0  # without tolerance whatever costs nothing may go

    def set_pressure(self) -> None:
        """lambda = T lambda_0 and W = delta_w T W_gamma; none while the metric recovers, or once pruning has ended."""
        state, config = self.state, self.config
        state.pressure = 0.0 if state.below or state.finished else state.slack * state.pace
        factor = config.acceleration * state.pressure
        norms = self.norms()
        state.thresholds = {
            gate.name: factor * float(norms[gate.name][gate.keep()].quantile(config.threshold_quantile))
            for gate in self.gates
        }

    def split(self) -> None:
        """U: the lowest alpha of each layer's filters, one at least, as far as its floor allows."""
        norms = self.norms()
        self.state.unimportant = {gate.name: self._lowest(gate, norms[gate.name]) for gate in self.gates}

    def _lowest(self, gate: MaskGate, norms: Tensor) -> Tensor:
        keep = gate.keep()
        left = int(keep.sum())
        count = min(max(int(self.config.unimportant * left + _ROUNDING), 1), left - self.floors[gate.name])
        return keep & keep_highest([(-norms).masked_fill(~keep, -math.inf)], count)[0]

    def _remove(self) -> bool:
        """Remove what of U is below its threshold; whether there was any."""
        norms, removed = self.norms(), False
        for gate in self.gates:
            unimportant = self.state.unimportant[gate.name].to(norms[gate.name].device)
            gone = unimportant & (norms[gate.name] < self.state.thresholds[gate.name])
            if bool(gone.any()):
                gate.set_keep(gate.keep() & ~gone)
                removed = True
        return removed

    def pull(self, parameter: nn.Parameter, written: Sequence[tuple[GroupUnits, str]], grad: Tensor) -> Tensor:
        """`grad + lambda sign(w)` in the filters of U.

        written: groups whose units `parameter` writes, with its name in each.
        """
        strength = self.config.lasso_weight * self.state.pressure
        if not strength or not self.state.unimportant:
            return grad
        pulled = torch.zeros_like(grad, dtype=torch.bool)
        for units, tensor in written:
            pulled |= ~units.expand(~self.state.unimportant[units.name].to(grad.device), tensor)
        return torch.where(pulled, grad + strength * parameter.detach().sign(), grad)

    def record(self) -> dict[str, Any]:
        """E, the tolerance, and how metric and units went."""
        state = self.state
        return {
            "metric": self.config.metric,
            "reference": state.reference,
            "tolerance": self.config.max_metric_drop,
            "trajectory": [list(each) for each in state.trajectory],
        }

    def state_dict(self) -> dict[str, Any]:
        """The whole state."""
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.state = _State(**state)


def build(model: nn.Module, graph: Any, config: PlayAndPruneConfig) -> Recipe:
    """Masks over the filters of each width, pulled and closed as the validation metric allows."""
    groups = prunable_groups(model, graph.groups, config.include, config.exclude)
    units = [structures.group_structure(each, model) for each in groups if config.residual or each.role != "stream"]
    if not units:
        raise PruneError(f"all widths of {type(model).__name__} are residual streams; set residual=True.")
    device = next(model.parameters()).device
    game = PlayAndPrune(model, [MaskGate(each, device) for each in units], config)
    parameters = dict(model.named_parameters())
    written: dict[str, list[tuple[GroupUnits, str]]] = {}
    for each in units:
        for tensor in each.producers:
            if parameters[tensor].ndim > 1:
                written.setdefault(tensor, []).append((each, tensor))
    return Recipe(
        structures=units,
        schedule=schedules.one_shot(1.0),  # how much goes is known at the end alone
        gates=game.gates,
        transforms={
            parameters[tensor]: partial(game.pull, parameters[tensor], each) for tensor, each in written.items()
        },
        controller=game,
        review=game.review,
        record=game.record,
    )


TINY = {
    "accuracy": PlayAndPruneConfig(max_metric_drop=0.5, iteration_steps=2, lasso_weight=0.01),
    "loss": PlayAndPruneConfig(
        max_metric_drop=0.2, metric="loss", higher_is_better=False, iteration_steps=1, residual=True, patience=1
    ),
}
