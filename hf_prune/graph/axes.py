"""Axes: what the dimension algebra is about. What must be cut together is one axis.

A tensor dimension (`Dim`) is an ordered, row-major product of axes, like einops' `(h d)`. Axes live in a union-find:
each root is a leaf, a product of smaller axes, or a concatenation of smaller dims. Nothing is stored resolved: `flat`
resolves on every read, so an axis that is split late shows its parts in every tensor that used it early. Parts are
strictly smaller than the whole, so nothing can loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class Product:
    """An axis that turned out to be several, outermost first."""

    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Cat:
    """An axis that is made of several dims laid end to end."""

    parts: tuple[Dim, ...]


@dataclass(eq=False)
class Axis:
    """One independent stretch of units. `form` is None for a leaf, another axis once the two were found to be one."""

    size: int
    frozen: str | None = None
    normalised: bool = False
    marks: set[str] = field(default_factory=set)
    form: Axis | Product | Cat | None = None

    def part(self, size: int) -> Axis:
        """A new leaf that inherits what is known of this axis."""
        return Axis(size, self.frozen, self.normalised, set(self.marks))


Dim = tuple[Axis, ...]


class Shape(tuple[Dim, ...]):
    """The dims of one tensor, in order."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of every dim."""
        return tuple(map(size, self))


def fresh(size: int, frozen: str | None = None) -> Dim:
    """A dim of one new axis."""
    return (Axis(size, frozen),)


def find(axis: Axis) -> Axis:
    """The root that stands for `axis`."""
    while isinstance(axis.form, Axis):
        if isinstance(axis.form.form, Axis):
            axis.form = axis.form.form
        axis = axis.form
    return axis


def flat(dim: Iterable[Axis]) -> list[Axis]:
    """The leaves and concatenations that `dim` is a product of; size-1 axes are nothing."""
    factors: list[Axis] = []
    for axis in dim:
        root = find(axis)
        if isinstance(root.form, Product):
            factors += flat(root.form.axes)
        elif root.size != 1:
            factors.append(root)
    return factors


def size(dim: Iterable[Axis]) -> int:
    """Number of indices of `dim`."""
    return prod(axis.size for axis in dim)


def leaves(dim: Iterable[Axis]) -> Iterator[Axis]:
    """Every leaf that `dim` is made of."""
    for root in flat(dim):
        if isinstance(root.form, Cat):
            for part in root.form.parts:
                yield from leaves(part)
        else:
            yield root


def freeze(dim: Iterable[Axis], reason: str) -> None:
    """Forbid cutting any part of `dim`; the first reason stays."""
    for leaf in leaves(dim):
        leaf.frozen = leaf.frozen or reason


def normalise(dim: Iterable[Axis]) -> None:
    """Note that statistics are taken over `dim`: removing units changes the units that stay."""
    for leaf in leaves(dim):
        leaf.normalised = True


def mark(dim: Iterable[Axis], name: str) -> None:
    """Note the use that `dim` is put to (see `groups.ROLES`)."""
    for leaf in leaves(dim):
        leaf.marks.add(name)


def is_frozen(dim: Iterable[Axis]) -> bool:
    """True where no part of `dim` may be cut."""
    return all(leaf.frozen for leaf in leaves(dim))


def parts(dim: Dim) -> list[Dim]:
    """`dim` as dims laid end to end: a leading concatenation distributes over the factors after it."""
    factors = flat(dim)
    if not factors or not isinstance(factors[0].form, Cat):
        return [tuple(factors)]
    tail = tuple(factors[1:])
    return [piece + tail for part in factors[0].form.parts for piece in parts(part)]
