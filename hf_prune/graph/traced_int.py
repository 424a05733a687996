"""Integers that know where they come from, so that a size in the graph is an equation instead of a bare number.

While a model is traced, its int attributes and the shapes that it reads are `TracedInt` objects: ordinary ints that
carry an expression over attributes and shape reads. Arithmetic builds larger expressions; a use as a float (an
attention scale) and a comparison (a guard) are recorded, because both break silently when the value changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast


@dataclass(frozen=True)
class Attribute:
    """Item `index` (None for a plain int) of attribute `name` of module `module`; `config.x` is the module's config."""

    module: str
    name: str
    index: int | None
    value: int


@dataclass(frozen=True)
class Read:
    """Dimension `dim` of the tensor that the node of this name produced, as Python code read it."""

    node: str
    dim: int


@dataclass(frozen=True)
class Term:
    """`left symbol right` for a symbol in `+ - * //`; ints are literals."""

    symbol: str
    left: Expression
    right: Expression


Expression = Attribute | Read | Term | int


@dataclass
class Uses:
    """What code did with sizes besides passing them to operations.

    `factors` makes a size pose as another one where it is used as a float, to see which constants depend on it.
    """

    floats: dict[Expression, None] = field(default_factory=dict)
    """In the order of their first use, as a set would be in another one in every process; so are the others."""
    equal: dict[tuple[Expression, Expression], None] = field(default_factory=dict)
    unequal: dict[tuple[Expression, Expression], None] = field(default_factory=dict)
    """Found different; comparisons with a number are left out."""
    ordered: dict[tuple[Expression, Expression], None] = field(default_factory=dict)
    """Compared by which is larger; comparisons with a number are left out."""
    factors: Mapping[Expression, float] = field(default_factory=dict)


_uses: ContextVar[Uses | None] = ContextVar("uses", default=None)


@contextmanager
def recording(factors: Mapping[Expression, float]) -> Iterator[Uses]:
    """Collect float uses and comparisons of sizes made inside."""
    uses = Uses(factors=factors)
    token = _uses.set(uses)
    try:
        yield uses
    finally:
        _uses.reset(token)


def expression(value: int) -> Expression:
    """The expression of a `TracedInt`, or the number itself."""
    return value.source if isinstance(value, TracedInt) else value


def holds_attribute(source: Expression) -> bool:
    """Whether the expression needs an attribute, and not only shapes and numbers."""
    if isinstance(source, Term):
        return holds_attribute(source.left) or holds_attribute(source.right)
    return isinstance(source, Attribute)


class TracedInt(int):
    """An int with the expression that it is the value of."""

    source: Expression

    def __new__(cls, value: int, source: Expression) -> TracedInt:  # noqa: D102
        self = super().__new__(cls, value)
        self.source = source
        return self

    __hash__ = int.__hash__

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (int(self),)

    def __eq__(self, other: object) -> bool:
        result = int.__eq__(self, other)
        uses = _uses.get()
        if uses is not None and result is True:
            uses.equal[self.source, expression(cast(int, other))] = None
        elif uses is not None and isinstance(other, TracedInt):
            uses.unequal[self.source, other.source] = None
        return result

    def __ne__(self, other: object) -> bool:
        result = self.__eq__(other)
        return result if result is NotImplemented else not result

    def as_float(self) -> float:
        """The value for a formula, which is noted."""
        value, uses = int.__float__(self), _uses.get()
        if uses is None:
            return value
        uses.floats[self.source] = None
        return value * uses.factors.get(self.source, 1.0)

    def __float__(self) -> float:
        return self.as_float()

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """A formula of numpy, which reads subclasses of int past `__float__`."""
        plain = [int(each) if isinstance(each, TracedInt) else each for each in inputs]
        result = getattr(function, method)(*plain, **kwargs)
        if getattr(getattr(result, "dtype", None), "kind", None) != "f":
            return result
        posing = [each.as_float() if isinstance(each, TracedInt) else each for each in inputs]
        return result if posing == plain else getattr(function, method)(*posing, **kwargs)


def _arithmetic(symbol: str, name: str) -> None:
    """Give `TracedInt` the operator `name`: between ints the result is an expression, otherwise a use in a formula."""
    plain = getattr(int, f"__{name}__")

    def forward(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            self.as_float()
            return plain(self, other)
        return TracedInt(plain(self, other), Term(symbol, self.source, expression(other)))

    def reflected(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            self.as_float()
            return NotImplemented
        return TracedInt(plain(other, self), Term(symbol, expression(other), self.source))

    setattr(TracedInt, f"__{name}__", forward)
    setattr(TracedInt, f"__r{name}__", reflected)


def _formula(name: str) -> None:
    """Give `TracedInt` the operator `name`, whose result carries no expression: a use in a formula."""
    exact, inexact = getattr(int, name), getattr(float, name)

    def method(self: TracedInt, *others: Any) -> Any:
        value, result = self.as_float(), exact(self, *others)
        return result if isinstance(result, int) or value == int(self) else inexact(value, *others)

    setattr(TracedInt, name, method)


def _order(name: str) -> None:
    """Give `TracedInt` the comparison `name`."""
    plain = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        uses = _uses.get()
        if uses is not None and isinstance(other, TracedInt):
            uses.ordered[self.source, other.source] = None
        return plain(self, other)

    setattr(TracedInt, name, method)


for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv")):
    _arithmetic(_symbol, _name)
for _name in ("__truediv__", "__rtruediv__", "__pow__", "__rpow__"):
    _formula(_name)
for _name in ("__lt__", "__le__", "__gt__", "__ge__"):
    _order(_name)
