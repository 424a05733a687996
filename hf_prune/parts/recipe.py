"""What a method is made of: the parts that `build` returns and `Pruner` runs. Every field is optional."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hf_prune.parts.gates import Gate
from hf_prune.parts.selection import Selection
from hf_prune.parts.statistics import Calibration
from hf_prune.types import Phase, Schedule, Structure

if TYPE_CHECKING:
    from hf_prune.parts.rounds import Round


class Controller(Protocol):
    """Decides from synchronised numbers only, so that every process decides alike."""

    def phase(self, step: int) -> Phase:
        """What trains in the optimizer step that comes next."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """After an optimizer step `step`, `total_steps`, `progress`, `sparsity`; after an evaluation its metrics."""

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run needs; plain numbers, strings and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class GuardedRun(Protocol):
    """What a review may ask of the run: `Pruner`."""

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now, on validation data."""

    def snapshot(self) -> None:
        """Remember model and optimizer."""

    def rollback(self) -> None:
        """Return to the last snapshot."""


@dataclass
class Recipe:
    """The composition of one run on one model."""

    structures: Sequence[Structure] = ()
    scores: Callable[[], Mapping[str, Tensor]] | None = None
    """Structure name -> `(units,)`, higher stays."""
    measured_scores: Callable[[Calibration], Mapping[str, Tensor]] | None = None
    """In place of `scores` where these need data or much time: asked, in evaluation mode, each time the schedule has
    risen, and the plan stays in between. So a schedule in steps (`schedules.staircase`) says how often."""
    needs_data: bool = True
    """False where `measured_scores` reads the weights alone."""
    selection: Selection | None = None
    schedule: Schedule | None = None
    """Progress -> share of the way to the goal, handed to `selection`."""
    fixed_from: float | None = None
    """Progress from which the plan no longer changes."""
    shrink_at: Sequence[float] = ()
    """Points of progress at which the units that the plan drops are cut out of the model for good
    (`Pruner.shrink_now`): from there on steps cost less, and these units never come back, whatever `selection` says.
    Gates must be `ShrinkableGate`s, such as masks over dimension groups."""
    gates: Sequence[Gate] = ()
    penalties: Mapping[str, Callable[[float], Tensor]] = field(default_factory=dict)
    """Name -> function of progress, added to the loss."""
    transforms: Mapping[nn.Parameter, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    projections: Sequence[Callable[[], None]] = ()
    controller: Controller | None = None
    optimizers: Mapping[str, Mapping[str, Any] | Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = field(
        default_factory=dict
    )
    """Kind of gate parameter -> options of a group in the user's optimizer (`lr`), or a factory of one of its own."""
    passes: Callable[[Any, nn.Module, Mapping[str, Any]], Tensor] | None = None
    """`(pruner, model, inputs) -> loss`, in place of the single forward pass. `model` is the one to call: it may wrap
    the pruned one (DDP, compile). `pruner.loss` adds distillation and penalties to the task loss of a pass."""
    review: Callable[[GuardedRun], None] | None = None
    """Called after each optimizer step, once plan and phase have moved; decides from synchronised numbers only."""
    record: Callable[[], Mapping[str, Any]] | None = None
    """What the report shall tell of the run, in plain JSON types."""
    frozen: Sequence[str] = ()
    """Parameters that do not train in this run at all."""
    rounds: Sequence[Round] = ()
    """Runs in a row that `PruneTrainer` makes instead of one with the parts above (see `parts.rounds`)."""
