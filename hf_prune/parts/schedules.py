"""Progress of the run in [0, 1] -> share of the way to the goal in [0, 1]. Pure functions without a step counter."""

from __future__ import annotations

import math

from hf_prune.types import Schedule


def _clamp(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def cubic(begin: float = 0.0, end: float = 1.0) -> Schedule:
    """Fast early, slow late: `1 - (1 - x)^3` with x running from 0 at `begin` to 1 at `end` (Zhu & Gupta 2017, eq. 1).

    >>> cubic(0.0, 1.0)(0.5)
    0.875
    """
    return lambda progress: 1.0 - (1.0 - _clamp((progress - begin) / (end - begin))) ** 3


def linear(begin: float = 0.0, end: float = 1.0) -> Schedule:
    """The same share in every step between `begin` and `end`.

    >>> linear(0.2, 0.6)(0.4)
    0.5
    """
    return lambda progress: round(_clamp((progress - begin) / (end - begin)), 12)


def one_shot(at: float = 0.0) -> Schedule:
    """Nothing before `at`, everything from there on.

    >>> one_shot(0.5)(0.4), one_shot(0.5)(0.5)
    (0.0, 1.0)
    """
    return lambda progress: float(progress >= at)


def staircase(begin: float = 0.0, end: float = 1.0, steps: int = 1) -> Schedule:
    """`steps` equal rises at equal distances, the first at `begin` and the last at `end`; a single one at `begin`.

    >>> [staircase(0.2, 0.6, 3)(progress) for progress in (0.1, 0.2, 0.5, 0.6)]
    [0.0, 0.3333333333333333, 0.6666666666666666, 1.0]
    """

    def share(progress: float) -> float:
        if progress < begin:
            return 0.0
        passed = steps if steps == 1 else 1 + math.floor((progress - begin) / (end - begin) * (steps - 1) + 1e-9)
        return min(passed, steps) / steps

    return share


def rises(begin: float, end: float, steps: int) -> tuple[float, ...]:
    """Where `staircase` with the same arguments rises.

    >>> rises(0.25, 0.75, 3)
    (0.25, 0.5, 0.75)
    """
    return tuple(begin + (end - begin) * i / max(steps - 1, 1) for i in range(steps))


def annealed(mu: float, begin: float = 0.0, end: float = 1.0, steps: int = 100) -> Schedule:
    """Of what goes, all but `(N - e) / (N + mu e)` is gone after event e of N = `steps` (Barbu et al. 2017, FSA).

    Large `mu` removes most in the first events; 0 removes the same in each.

    >>> [round(annealed(5.0, 0.0, 0.5, 50)(progress), 3) for progress in (0.05, 0.25, 0.5)]
    [0.4, 0.857, 1.0]
    """

    def share(progress: float) -> float:
        event = math.floor(_clamp((progress - begin) / (end - begin)) * steps + 1e-9)
        return 1.0 - (steps - event) / (steps + mu * event)

    return share
