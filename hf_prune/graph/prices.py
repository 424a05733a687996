"""What a plan costs, in closed form: every price is a polynomial in the sizes of the groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.graph.axes import Axis, Cat, Dim, flat

Polynomial = Counter[tuple[int, ...]]
"""Sorted variable numbers, repeated for powers -> coefficient."""


@dataclass(frozen=True)
class Price:
    """Multiply-adds per sample, number of parameters, bytes of parameters."""

    multiply_adds: float
    parameters: float
    bytes: float


class Prices:
    """Evaluates `Price` for any sizes of the groups `axes`, in the order given."""

    def __init__(
        self, axes: Sequence[Axis], costs: Iterable[Dim], tensors: Iterable[tuple[Dim, int]], samples: int
    ) -> None:
        """costs: one dim an operation.  tensors: all dims of each parameter in one, and bytes an element."""
        number = {axis: place for place, axis in enumerate(axes)}
        multiply_adds: Polynomial = Counter()
        parameters: Polynomial = Counter()
        size: Polynomial = Counter()
        for dim in costs:
            multiply_adds.update(_polynomial(dim, number))
        for dim, width in tensors:
            entries = _polynomial(dim, number)
            parameters.update(entries)
            size.update({term: count * width for term, count in entries.items()})
        terms = sorted({*multiply_adds, *parameters})
        one = len(axes)
        degree = max(map(len, terms), default=0)
        self.factors = torch.tensor([[*term, *[one] * (degree - len(term))] for term in terms], dtype=torch.long)
        rows = ([p[term] for term in terms] for p in (multiply_adds, parameters, size))
        self.coefficients = torch.tensor(list(rows), dtype=torch.float64)
        self.coefficients[0] /= samples

    def at(self, sizes: Tensor) -> Tensor:
        """Multiply-adds per sample, parameters and bytes, shape `(3,)`, differentiable in `sizes`: `(groups,)`."""
        extended = torch.cat([sizes.to(torch.float64), sizes.new_ones(1, dtype=torch.float64)])
        return self.coefficients.to(sizes.device) @ extended[self.factors.to(sizes.device)].prod(1)


def _polynomial(dim: Dim, number: Mapping[Axis, int]) -> Polynomial:
    """Size of `dim` as a polynomial in the sizes of the numbered axes."""
    product: Polynomial = Counter({(): 1})
    for axis in flat(dim):
        product = _times(product, _factor(axis, number))
    return product


def _factor(axis: Axis, number: Mapping[Axis, int]) -> Polynomial:
    if axis in number:
        return Counter({(number[axis],): 1})
    if not isinstance(axis.form, Cat):
        return Counter({(): axis.size})
    total: Polynomial = Counter()
    for part in axis.form.parts:
        total.update(_polynomial(part, number))
    return total


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    product: Polynomial = Counter()
    for a, x in left.items():
        for b, y in right.items():
            product[tuple(sorted(a + b))] += x * y
    return product
