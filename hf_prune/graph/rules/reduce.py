"""Operations that look along a dim: sums, statistics, order, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_prune.graph.axes import Dim, Shape, freeze, mark, normalise
from hf_prune.graph.dims import take, unify
from hf_prune.graph.rules.contract import SUMMED
from hf_prune.graph.rules.pointwise import Rule, pointwise

Effect = Callable[[Dim], None]


def _summed(dim: Dim) -> None:
    """A removed unit adds zero: exact."""
    mark(dim, SUMMED)


def _compared(dim: Dim) -> None:
    freeze(dim, "its places are compared or ordered")


def reducer(effect: Effect) -> Rule:
    """Rule of a reduction over `dim`, all dims where it is None; `effect` is what looking along a dim does to it."""

    def rule(flow: Any, node: Any, x: Shape, *rest: Any, **kwargs: Any) -> Any:
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names[1:], rest, strict=False)) | kwargs
        if "other" in given:
            return pointwise(flow, node, x, *rest)
        reduced = _positions(given.get("dim"), len(x))
        for position in reduced:
            effect(x[position])
        kept = [(position, () if position in reduced else dim) for position, dim in enumerate(x)]
        shape = Shape(dim for position, dim in kept if given.get("keepdim") or position not in reduced)
        value = node.meta["val"]
        return [shape] * len(value) if isinstance(value, tuple | list) else shape

    return rule


def _positions(dim: Any, rank: int) -> set[int]:
    if dim is None or dim == []:
        return set(range(rank))
    return {int(each) % rank for each in ([dim] if isinstance(dim, int) else dim)}


def along(effect: Effect) -> Rule:
    """Rule of an operation that keeps the shape and works along one dim: `softmax(x, dim)`."""

    def rule(flow: Any, node: Any, x: Shape, dim: int = -1, *_: Any, **__: Any) -> Any:
        effect(x[int(dim)])
        value = node.meta["val"]
        return [x] * len(value) if isinstance(value, tuple | list) else x

    return rule


def layer_norm(
    flow: Any,
    node: Any,
    x: Shape,
    sizes: Sequence[int],
    weight: Shape | None = None,
    bias: Shape | None = None,
    *_: Any,
) -> Shape:
    """Also `rms_norm`: statistics over the last dims, one scale and one offset an element."""
    last = x[-len(sizes) :]
    for count, dim in zip(sizes, last, strict=True):
        normalise(dim)
        flow.equations.equate(count, dim, "normalized_shape")
    for tensor in (weight, bias):
        for own, dim in zip(tensor if isinstance(tensor, Shape) else (), last, strict=False):
            unify(own, dim)
    return x


def batch_norm(flow: Any, node: Any, x: Shape, *rest: Any, **_: Any) -> Shape:
    """Also `instance_norm`: removing a channel changes nothing for the others, but positions share statistics."""
    for tensor in rest[:4]:
        if isinstance(tensor, Shape):
            unify(tensor[0], x[1])
    if len(rest) > 4 and rest[4]:
        for dim in (x[0], *x[2:]):
            normalise(dim)
    return x


def group_norm(
    flow: Any, node: Any, x: Shape, groups: int, weight: Shape | None = None, bias: Shape | None = None, *_: Any
) -> Shape:
    """Statistics over the channels of one group: whole groups can go exactly, channels inside cannot."""
    divided = take(x[1], int(groups))
    if divided is None:
        freeze(x[1], "groups of a norm that cross its blocks")
    else:
        flow.equations.equate(groups, divided[0], "num_groups")
        normalise(divided[1])
    for tensor in (weight, bias):
        if tensor is not None:
            unify(tensor[0], x[1])
    return x


RULES: dict[str, Rule] = {
    **dict.fromkeys(("sum", "nansum", "linalg_vector_norm", "norm"), reducer(_summed)),
    **dict.fromkeys(("mean", "var", "std", "var_mean"), reducer(normalise)),
    **dict.fromkeys(
        ("amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "logsumexp", "median"),
        reducer(_compared),
    ),
    **dict.fromkeys(
        ("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort"), along(_compared)
    ),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("batch_norm", "instance_norm"), batch_norm),
    "group_norm": group_norm,
}
