"""Operations that pick places: by range, by number, by a tensor of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_prune.graph.dims import Dim, Shape, concatenate, cut, divide, freeze, fresh, size, unify
from hf_prune.graph.rules.pointwise import broadcast


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
    if first:
        _bound(flow, start, before, concatenate([dims[dim], after]))
    if last < whole:
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


def narrow(flow: Any, node: Any, x: Shape, dim: int, start: int, length: int) -> Shape:
    dims = list(x)
    before, rest = cut(x[int(dim)], int(start))
    dims[int(dim)], _ = cut(rest, int(length))
    if int(start):
        flow.equations.equate(start, before, "a slice")
    flow.equations.equate(length, dims[int(dim)], "a slice")
    return Shape(dims)


def select(flow: Any, node: Any, x: Shape, dim: int, place: int) -> Shape:
    dim = int(dim) % len(x)
    freeze(x[dim], "one place of it is chosen")
    return Shape(each for i, each in enumerate(x) if i != dim)


def index(flow: Any, node: Any, x: Shape, indices: Sequence[Shape | None]) -> Shape:
    """`x[i, :, j]` with tensors of numbers: the indexed dims are frozen, those of the numbers take their place."""
    chosen = [place for place, each in enumerate(indices) if each is not None]
    if any(source.meta["val"].dtype.is_floating_point is False and source.meta["val"].dtype.itemsize == 1
           for source in node.args[1] if source is not None):
        return _masked(node, x)
    for place in chosen:
        freeze(x[place], "places chosen by data")
    shapes = [each for each in indices if each is not None]
    wide = max(map(len, shapes))
    columns = zip(*([()] * (wide - len(shape)) + list(shape) for shape in shapes), strict=True)
    picked = [broadcast(column) for column in columns]
    kept = [dim for place, dim in enumerate(x) if place not in chosen]
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    where = chosen[0] if adjacent else 0
    return Shape((*kept[:where], *picked, *kept[where:]))


def _masked(node: Any, x: Shape) -> Shape:
    """Indexing with a bool mask: nothing is known of what comes out."""
    for dim in x:
        freeze(dim, "places chosen by data")
    return Shape(fresh(count, "places chosen by data") for count in node.meta["val"].shape)


def gather(flow: Any, node: Any, x: Shape, dim: int, places: Shape, **_: Any) -> Shape:
    """The gathered dim is frozen, the others are those of the index."""
    dim = int(dim) % len(x)
    freeze(x[dim], "places chosen by data")
    for position, (own, other) in enumerate(zip(x, places, strict=True)):
        if position != dim and size(own) == size(other):
            unify(own, other)
        elif position != dim:
            freeze(own + other, "places chosen by data")
    return places


def index_select(flow: Any, node: Any, x: Shape, dim: int, places: Shape) -> Shape:
    freeze(x[int(dim)], "places chosen by data")
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


RULES = {
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "index": index,
    "gather": gather,
    "index_select": index_select,
    "embedding": embedding,
    "flip": ordered("first"),
    "roll": ordered("second"),
    **dict.fromkeys(("tril", "triu"), ordered("last two")),
    "unfold": unfold,
    "meshgrid": meshgrid,
}
