"""Controllers: what trains when, and multipliers that steer a penalty towards the goal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_prune.config import Goal
from hf_prune.types import Phase, Schedule

_MOST_MEMORY = math.log(100.0)  # the remembered part stays within a factor 100, so that it unwinds again
_MOST_GAP = 0.1  # scores need many steps to reach the threshold; until then a larger gap says nothing about the weight


class DualAscent:
    """The weight of a penalty, raised while the model is less sparse than scheduled and lowered while it is more so.

    With gap = wanted - reached sparsity (at most 0.1 either way),
    `log(weight / first weight) = gain * gap + 2 * gain * (integral of gap over progress)`:
    the multiplier of an augmented Lagrangian, in logarithms because the right scale is unknown. Scores integrate the
    penalty's gradient themselves, so the first term, which forgets, is what keeps the loop from swinging.
    """

    def __init__(self, weight: float, goal: Goal, schedule: Schedule, *, gain: float) -> None:
        self.first, self.goal, self.schedule, self.gain = weight, goal, schedule, gain
        self.gap = self.memory = self.progress = 0.0

    @property
    def weight(self) -> float:
        """What the penalty is multiplied by in the coming step."""
        return self.first * math.exp(self.gain * self.gap + self.memory)

    def phase(self, step: int) -> Phase:
        """Always the same one: everything trains."""
        return Phase("train")

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Move the weight after an optimizer step."""
        if "progress" not in metrics:
            return
        gap = 1.0 - self.goal.kept(self.schedule(metrics["progress"])) - metrics["sparsity"]
        self.gap = min(max(gap, -_MOST_GAP), _MOST_GAP)
        moved = self.memory + 2.0 * self.gain * self.gap * (metrics["progress"] - self.progress)
        self.memory = min(max(moved, -_MOST_MEMORY), _MOST_MEMORY)
        self.progress = metrics["progress"]

    def state_dict(self) -> dict[str, Any]:
        """The two terms, and the progress up to which the integral runs."""
        return {"gap": self.gap, "memory": self.memory, "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.gap, self.memory, self.progress = state["gap"], state["memory"], state["progress"]
