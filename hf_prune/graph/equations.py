"""Turns the source of a number into the dim that the number is the size of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from hf_prune.graph.axes import Axis, Dim, Shape, flat, freeze, fresh, is_frozen, parts, size
from hf_prune.graph.dims import concatenate, take, unify
from hf_prune.graph.traced_int import Attribute, Expression, Read, Term, TracedInt

NUMBER = "a number in code"


@dataclass
class Equations:
    """Every attribute has a dim; an equation makes the dim of an expression and a dim of the graph one.

    shapes: node name -> what the node gave.
    """

    shapes: Mapping[str, Any]
    attributes: dict[Attribute, Dim] = field(default_factory=dict)

    def equate(self, number: int, dim: Dim, where: str) -> None:
        """The size that code passed for `dim`: an equation if its source is known, else `dim` must keep its size."""
        if isinstance(number, TracedInt):
            self._join(self.dim_of(number.source, like=dim), dim, f"{where} is given a size that cannot be followed")
        else:
            freeze(dim, f"{where} is given the number {number}")

    def compare(self, left: Expression, right: Expression) -> None:
        """Code found the two sizes equal, and may do something else once they are not."""
        self._join(self.dim_of(left), self.dim_of(right), "compared with a size that cannot be followed")

    def fix(self, left: Expression, right: Expression) -> None:
        """Code does one thing or another by which of two shapes is larger: both must stay."""
        for expression in (left, right):
            freeze(self.dim_of(expression), "code asks whether it is larger than another size")

    def pin(self, expression: Expression) -> None:
        """Code computed a float from this size: its value must stay."""
        freeze(self.dim_of(expression), "its size is used in a formula, such as an attention scale")

    def dim_of(self, expression: Expression, like: Dim = ()) -> Dim:
        """The dim whose size `expression` is. `like` orders the factors of a product, which numbers do not."""
        if isinstance(expression, Attribute):
            return self.attributes.setdefault(expression, fresh(expression.value))
        if isinstance(expression, Read):
            shape = self.shapes.get(expression.node)
            return shape[expression.dim] if isinstance(shape, Shape) else ()
        if isinstance(expression, Term):
            return self._term(expression, like)
        return fresh(expression, NUMBER)

    def _term(self, term: Term, like: Dim) -> Dim:
        if term.symbol == "*":
            return _ordered(list(self._factors(term)), like)
        left, right = self.dim_of(term.left), self.dim_of(term.right)
        if term.symbol == "+" and min(size(left), size(right)) >= 0:
            return concatenate([left, right])
        if term.symbol == "//" and size(right) > 0:
            return _quotient(left, right)
        if term.symbol == "-" and size(left) >= size(right) >= 0:
            return _difference(left, right)
        freeze(left + right, NUMBER)
        return ()

    def _factors(self, expression: Expression) -> Iterator[Dim]:
        if isinstance(expression, Term) and expression.symbol == "*":
            yield from self._factors(expression.left)
            yield from self._factors(expression.right)
        else:
            yield self.dim_of(expression)

    @staticmethod
    def _join(a: Dim, b: Dim, otherwise: str) -> None:
        """Keep two sizes equal. Products of the same factors are, in whatever order; else the dims become one."""
        if size(a) != size(b):
            freeze(a + b, otherwise)
        elif Counter(flat(a)) != Counter(flat(b)):
            unify(a, b)


def _ordered(factors: list[Dim], like: Dim) -> Dim:
    """The product of `factors` in the order that agrees best with what is known of `like`.

    Where nothing is known, numbers come first: `2 * width` is two parts of that width.
    """
    target = flat(like)
    factors = sorted(factors, key=lambda dim: not is_frozen(dim))

    def agreement(dims: tuple[Dim, ...]) -> int:
        found = flat(axis for dim in dims for axis in dim)
        return max(_common(found, target), _common(found[::-1], target[::-1]))

    orders = permutations(factors) if len(factors) < 5 else [tuple(factors)]
    return tuple(axis for dim in max(orders, key=agreement) for axis in dim)


def _common(left: list[Axis], right: list[Axis]) -> int:
    """Length of the common beginning."""
    pairs = zip(left, right, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a is not b), min(len(left), len(right)))


def _quotient(whole: Dim, divisor: Dim) -> Dim:
    """`whole` without the factors of `divisor`: those that it ends or begins with, else its first ones."""
    factors, removed = flat(whole), flat(divisor)
    if removed and factors[-len(removed) :] == removed:
        return tuple(factors[: -len(removed)])
    taken = take(whole, size(divisor))
    if taken is None:
        freeze(whole + divisor, NUMBER)
        return fresh(size(whole) // size(divisor), NUMBER)
    unify(taken[0], divisor)
    return taken[1]


def _difference(whole: Dim, removed: Dim) -> Dim:
    """`whole` without its first or last part."""
    if not size(removed):
        return whole
    pieces = parts(whole)
    for gone, rest in ((pieces[-1], pieces[:-1]), (pieces[0], pieces[1:])):
        if flat(gone) == flat(removed):
            return concatenate(rest)
    freeze(whole + removed, NUMBER)
    return fresh(size(whole) - size(removed), NUMBER)
