"""Controllers: what trains when, and multipliers that steer a penalty towards the goal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_prune.config import Goal
from hf_prune.types import Phase, Schedule

_LIMIT = math.log(1e6)


class DualAscent:
    """The weight of a penalty, raised while the model is less sparse than scheduled and lowered while it is more so.

    `log weight` integrates the gap between wanted and reached sparsity over progress: a gap of 0.1 held for a tenth of
    the run changes the weight by a factor `exp(gain / 100)`. The weight stays within a factor 1e6 of where it began.
    """

    def __init__(self, weight: float, goal: Goal, schedule: Schedule, *, gain: float) -> None:
        self.start, self.goal, self.schedule, self.gain = weight, goal, schedule, gain
        self.log_factor = 0.0
        self.progress = 0.0

    @property
    def weight(self) -> float:
        return self.start * math.exp(self.log_factor)

    def phase(self, step: int) -> Phase:
        return Phase("train")

    def observe(self, metrics: Mapping[str, float]) -> None:
        if "progress" not in metrics:
            return
        wanted = 1.0 - self.goal.kept(self.schedule(metrics["progress"]))
        gap = wanted - metrics["sparsity"]
        moved = self.log_factor + self.gain * gap * (metrics["progress"] - self.progress)
        self.log_factor = min(max(moved, -_LIMIT), _LIMIT)
        self.progress = metrics["progress"]

    def state_dict(self) -> dict[str, Any]:
        return {"log_factor": self.log_factor, "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_factor, self.progress = state["log_factor"], state["progress"]
