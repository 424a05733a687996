"""Operations that pick places: by range, by number, by a tensor of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_prune.graph.axes import Dim, Shape, freeze, fresh, size
from hf_prune.graph.dims import concatenate, cut, divide, unify
from hf_prune.graph.rules.pointwise import Rule, broadcast

CHOSEN = "places chosen by data"


def slice_(
    flow: Any, node: Any, x: Shape, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Shape:
    """`x[start:stop:step]` along `dim`; bounds that are bare numbers pin what they count."""
    dims, dim = list(x), int(dim)
    if step != 1:
        dims[dim] = _strided(x[dim], node.meta["val"].shape[dim], int(step))
        return Shape(dims)
    whole = size(x[dim])
    first, last, _ = slice(start, stop).indices(whole)
    before, rest = cut(x[dim], first)
    dims[dim], after = cut(rest, last - first)
    if start is not None and first:
        _bound(flow, start, before, concatenate([dims[dim], after]))
    if stop is not None and last < whole:
        _bound(flow, stop, concatenate([before, dims[dim]]), after)
    return Shape(dims)


def _bound(flow: Any, bound: int, before: Dim, after: Dim) -> None:
    """A border between two parts: a negative bound counts the part after it."""
    if bound >= 0:
        flow.equations.equate(bound, before, "a slice")
    else:
        freeze(after, f"a slice is given the number {int(bound)}")


def _strided(dim: Dim, count: int, step: int) -> Dim:
    divided = divide(dim, step) if size(dim) == count * step else None
    if divided is None:
        freeze(dim, "every n-th place is taken")
        return fresh(count, "every n-th place is taken")
    freeze(divided[1], "every n-th place is taken")
    return divided[0]


def narrow(flow: Any, node: Any, x: Shape, dim: int, start: int | Shape, length: int) -> Shape:
    dims = list(x)
    if isinstance(start, Shape):
        freeze(x[int(dim)], "a start that is read from data")
        dims[int(dim)] = fresh(int(length), "a start that is read from data")
        return Shape(dims)
    before, rest = cut(x[int(dim)], int(start))
    dims[int(dim)], _ = cut(rest, int(length))
    if int(start):
        flow.equations.equate(start, before, "a slice")
    flow.equations.equate(length, dims[int(dim)], "a slice")
    return Shape(dims)


def select(flow: Any, node: Any, x: Shape, dim: int, place: int) -> Shape:
    dim = int(dim) % len(x)
    if node in flow.live:
        freeze(x[dim], "one place of it is chosen")
    return Shape(each for i, each in enumerate(x) if i != dim)


def index(flow: Any, node: Any, x: Shape, indices: Sequence[Shape | None]) -> Shape:
    """`x[i, :, j]` with tensors of numbers, whose dims take the place of the indexed ones, or with a mask."""
    before, picked, after = _indexed(node, x, indices)
    if picked is None:
        picked = [fresh(node.meta["val"].shape[len(before)], CHOSEN)]
    return Shape((*before, *picked, *after))


def index_put(
    flow: Any, node: Any, x: Shape, indices: Sequence[Shape | None], values: Shape, *_: Any, **__: Any
) -> Shape:
    """`x[i, :, j] = values`."""
    before, picked, after = _indexed(node, x, indices)
    for own, dim in zip(values[::-1], (*before, *(picked or [()]), *after)[::-1], strict=False):
        if size(own) == size(dim):
            unify(own, dim)
        else:
            freeze(own, CHOSEN)
    return x


def index_add(flow: Any, node: Any, x: Shape, dim: int, places: Shape, values: Shape, *_: Any, **__: Any) -> Shape:
    """`x[places] += values` along `dim`; also `index_copy`."""
    for position, (own, other) in enumerate(zip(x, values, strict=True)):
        if position == int(dim) % len(x):
            freeze(own + other, CHOSEN)
        else:
            unify(own, other)
    return x


def _indexed(
    node: Any, x: Shape, indices: Sequence[Shape | None]
) -> tuple[tuple[Dim, ...], list[Dim] | None, tuple[Dim, ...]]:
    """Dims before, instead of (None: as many as a mask picks) and after the indexed ones.

    What stands instead comes first where the indexed dims are not neighbours.
    """
    chosen = [place for place, each in enumerate(indices) if each is not None]
    source = node.args[1][chosen[0]].meta["val"]
    masked = source.dtype in (torch.bool, torch.uint8)
    last = chosen[0] + source.ndim - 1 if masked else chosen[-1]
    if masked or chosen == list(range(chosen[0], last + 1)):
        before, after, gone = x[: chosen[0]], x[last + 1 :], x[chosen[0] : last + 1]
    else:
        before, after = (), tuple(dim for place, dim in enumerate(x) if place not in chosen)
        gone = tuple(x[place] for place in chosen)
    for dim in gone:
        freeze(dim, CHOSEN)
    if masked:
        return before, None, after
    shapes = [each for each in indices if each is not None]
    wide = max(map(len, shapes))
    columns = zip(*([()] * (wide - len(shape)) + list(shape) for shape in shapes), strict=True)
    return before, [broadcast(column) for column in columns], after


def gather(flow: Any, node: Any, x: Shape, dim: int, places: Shape, **_: Any) -> Shape:
    """The gathered dim is frozen, the others are those of the index."""
    dim = int(dim) % len(x)
    freeze(x[dim], CHOSEN)
    for position, (own, other) in enumerate(zip(x, places, strict=True)):
        if position != dim and size(own) == size(other):
            unify(own, other)
        elif position != dim:
            freeze(own + other, CHOSEN)
    return places


def index_select(flow: Any, node: Any, x: Shape, dim: int, places: Shape) -> Shape:
    freeze(x[int(dim)], CHOSEN)
    dims = list(x)
    dims[int(dim)] = places[0]
    return Shape(dims)


def embedding(flow: Any, node: Any, weight: Shape, places: Shape, *_: Any, **__: Any) -> Shape:
    freeze(weight[0], "embedding rows")
    return Shape((*places, weight[1]))


def ordered(positions: str) -> Any:
    """Rule of an operation that keeps the shape but gives places a meaning: `roll`, `flip`, `tril`."""

    def rule(flow: Any, node: Any, x: Shape, first: Any = (), second: Any = (), **_: Any) -> Shape:
        chosen = {"first": first, "second": second, "last two": (-1, -2)}[positions]
        for place in [chosen] if isinstance(chosen, int) else chosen or range(len(x)):
            freeze(x[int(place)], "the order of its places matters")
        return x

    return rule


def unfold(flow: Any, node: Any, x: Shape, dim: int, *_: Any) -> Shape:
    """Windows over one dim."""
    freeze(x[int(dim)], "cut into windows")
    dims = [*x, ()]
    for place in (int(dim) % len(x), len(x)):
        dims[place] = fresh(node.meta["val"].shape[place], "cut into windows")
    return Shape(dims)


def meshgrid(flow: Any, node: Any, tensors: Sequence[Shape], indexing: str = "ij", **_: Any) -> list[Shape]:
    dims = [shape[0] if shape else () for shape in tensors]
    if indexing == "xy":
        dims[:2] = dims[1::-1]
    return [Shape(dims)] * len(tensors)


RULES: dict[str, Rule] = {
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "index": index,
    "index_put": index_put,
    **dict.fromkeys(("index_add", "index_copy"), index_add),
    "gather": gather,
    "index_select": index_select,
    "embedding": embedding,
    "flip": ordered("first"),
    "roll": ordered("second"),
    **dict.fromkeys(("tril", "triu"), ordered("last two")),
    "unfold": unfold,
    "meshgrid": meshgrid,
}
