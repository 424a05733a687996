"""What every method's configuration shares: one goal, what to prune, when, and a strict JSON round trip."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

GOALS = (
    "final_sparsity",
    "target_units",
    "target_params",
    "target_flops",
    "target_latency",
    "target_bytes",
    "max_metric_drop",
)
PRICED = ("target_params", "target_flops", "target_latency", "target_bytes")
"""Goals that a whole model has a price in."""
SCOPES = ("global", "per_group")


@dataclass(frozen=True)
class Goal:
    """The one goal of a run. `value` is the fraction removed for `final_sparsity`, the fraction kept for `target_*`."""

    name: str
    value: float

    def kept(self, share: float) -> float:
        """Fraction of the goal's unit (weights, multiply-adds, ...) that stays after `share` of the way, in [0, 1]."""
        final = 1.0 - self.value if self.name == "final_sparsity" else self.value
        return 1.0 - (1.0 - final) * share


@dataclass(frozen=True)
class PruneConfig:
    """Fields that all methods share; a method's own config adds at most twelve. Unknown keys raise."""

    method: ClassVar[str] = ""
    rounds_widths: ClassVar[bool] = False
    """Whether the method takes `width_multiple`."""

    final_sparsity: float | None = None  # fraction of prunable weights removed at the end, in [0, 1)
    target_units: float | None = None  # fraction of the units of the groups (channels, heads, neurons) kept, in (0, 1]
    target_params: float | None = None  # fraction of parameters kept, in (0, 1]
    target_flops: float | None = None  # fraction of multiply-adds kept, in (0, 1]
    target_latency: float | None = None  # fraction of the dense latency kept, measured on this machine, in (0, 1]
    target_bytes: float | None = None  # fraction of the dense file size kept, in (0, 1]
    max_metric_drop: float | None = None  # most that the evaluation metric may lose, in the metric's own unit
    include: tuple[str, ...] = ()  # globs of modules to prune; empty: linear and conv layers of the repeated blocks
    exclude: tuple[str, ...] = ()  # globs of modules that stay as they are
    structure: str = "element"  # how a weight divides into units
    scope: str = "global"  # "global": one ranking over all weights; "per_group": the same fraction of each
    begin: float = 0.0  # share of the optimizer steps after which pruning starts, in [0, 1)
    end: float = 1.0  # share of the optimizer steps at which the goal is reached, in (begin, 1]
    min_keep: float = 0.0  # fraction of the units of each weight or group that always stays; one unit always does
    width_multiple: int = 1  # kept widths are whole or multiples of this, in groups of at least four multiples
    seed: int = 0  # of every random choice that the method itself makes

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise TypeError(f"{name} must be a tuple of globs, got the string {patterns!r}; write ({patterns!r},).")
            if not isinstance(patterns, (tuple, list)) or not all(isinstance(each, str) for each in patterns):
                raise TypeError(f"{name} must be a tuple of globs (strings), got {patterns!r}.")
            object.__setattr__(self, name, tuple(patterns))
        for each in dataclasses.fields(self):
            if each.type in ("int", int):  # a module without postponed annotations has the class
                require_whole(each.name, getattr(self, each.name))
        require_choice("scope", self.scope, SCOPES)
        require_range("begin", self.begin, 0.0, 1.0)
        require_range("end", self.end, 0.0, 1.0)
        if not self.begin < self.end:
            raise ValueError(
                f"begin must be below end (both are shares of the optimizer steps), got begin={self.begin}, "
                f"end={self.end}."
            )
        require_range("min_keep", self.min_keep, 0.0, 1.0, closed_right=False)
        self._check_goals()
        self._check_widths()

    def _check_widths(self) -> None:
        require_range("width_multiple", self.width_multiple, 1, math.inf, closed_right=False)
        if self.width_multiple == 1:
            return
        if not self.rounds_widths:
            raise ValueError(f"{type(self).__name__} does not round widths; leave width_multiple at 1.")
        if self.goal is None or self.goal.name not in PRICED or self.structure == "layer":
            raise ValueError(
                f"width_multiple={self.width_multiple} goes with units of groups and a goal of {', '.join(PRICED)}; "
                "set one of these, or leave it at 1."
            )

    def _check_goals(self) -> None:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a run has one goal, got {', '.join(given)}; keep one of them.")
        if self.final_sparsity is not None:
            require_range("final_sparsity", self.final_sparsity, 0.0, 1.0, closed_right=False)
        for name in (goal for goal in GOALS if goal.startswith("target_")):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 0.0, 1.0, closed_left=False)
        if self.max_metric_drop is not None:
            require_range("max_metric_drop", self.max_metric_drop, 0.0, math.inf, closed_right=False)
        if self.final_sparsity is not None and self.final_sparsity + self.min_keep > 1.0 + 1e-9:
            raise ValueError(
                f"min_keep={self.min_keep} keeps more of every weight than final_sparsity={self.final_sparsity} "
                "leaves; lower one of them."
            )

    @property
    def goal(self) -> Goal | None:
        """The goal that was set, or None."""
        for name in GOALS:
            if getattr(self, name) is not None:
                return Goal(name, float(getattr(self, name)))
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the method's name under `method`."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"method": self.method, **fields}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown key (the closest real one is named), or a `method` that is not this class's.
        """
        values = dict(values)
        method = values.pop("method", cls.method)
        if method != cls.method:
            raise ValueError(f"{cls.__name__} is the config of {cls.method!r}, got a config of {method!r}.")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"{cls.__name__} has no field {key!r}{closest(key, known)}.")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`; raises like `from_dict`."""
        return cls.from_dict(json.loads(text))


def require_goal(config: PruneConfig, names: tuple[str, ...]) -> None:
    """Raise a ValueError unless the config has a goal, one of `names`."""
    if config.goal is None or config.goal.name not in names:
        raise ValueError(f"{type(config).__name__} needs one goal of {', '.join(names)}.")


def require_removal(config: PruneConfig) -> None:
    """Raise a ValueError where the config has a goal that removes nothing."""
    if config.goal is not None and config.goal.kept(1.0) == 1.0:
        raise ValueError(f"{config.goal.name}={config.goal.value} removes nothing.")


def closest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'x'?`, or the whole list where nothing is close."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def require_range(
    name: str, value: float, low: float, high: float, *, closed_left: bool = True, closed_right: bool = True
) -> None:
    """Raise a ValueError that shows the interval unless `value` is a number inside it."""
    left, right = "[" if closed_left else "(", "]" if closed_right else ")"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = (
        number and (low <= value if closed_left else low < value) and (value <= high if closed_right else value < high)
    )
    if not inside:
        raise ValueError(f"{name} must be a number in {left}{low:g}, {high:g}{right}, got {value!r}.")


def require_whole(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{closest(str(value), choices)}.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
