"""Operations that work on each element by itself, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from hf_prune.graph.axes import Dim, Shape, flat, mark
from hf_prune.graph.dims import unify
from hf_prune.graph.traced_int import TracedInt

Rule = Callable[..., Any]

POINTWISE = (
    "__and__ __or__ __xor__ _to_copy absolute alias alpha_dropout clip clone contiguous copy detach divide dropout "
    "feature_dropout fill hardsigmoid hardswish lift_fresh lift_fresh_copy masked_fill mish multiply negative real "
    "relu6 rrelu selu square subtract to true_divide"
).split()
"""Pointwise operations that torch does not tag as such."""

RESIDUAL = ("add", "add_")


def pointwise(flow: Any, node: Any, *args: Any, **kwargs: Any) -> Shape:
    """Dims that are not 1 become one, aligned at the right."""
    shapes = [value for value in (*args, *kwargs.values()) if isinstance(value, Shape)]
    for number in (*args, *kwargs.values()):
        if isinstance(number, TracedInt):
            flow.equations.pin(number.source)
    columns = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=())
    residual = node.target.overloadpacket.__name__ in RESIDUAL and not any(map(flow.is_weight, node.args))
    return Shape(broadcast(column, residual) for column in list(columns)[::-1])


def broadcast(dims: tuple[Dim, ...], residual: bool = False) -> Dim:
    """The one dim that `dims` of sizes n and 1 become; `residual` marks it where it was two before."""
    wide = [dim for dim in dims if flat(dim)]
    if not wide:
        return ()
    first, *others = wide
    for other in others:
        if residual and flat(first) != flat(other):
            mark(first, "stream")
        unify(first, other)
    return first
