"""Operations that move, join and cut dims without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_prune.graph.axes import Dim, Shape, freeze, fresh, size
from hf_prune.graph.dims import concatenate, cut, regroup, unify
from hf_prune.graph.rules.pointwise import Rule, broadcast


def view(flow: Any, node: Any, x: Shape, sizes: Sequence[int]) -> Shape:
    """Also `reshape`: a size of -1 follows from the others."""
    shape = Shape(regroup(x, node.meta["val"].shape))
    for count, dim in zip(sizes, shape, strict=True):
        if int(count) != -1:
            flow.equations.equate(count, dim, "a view")
    return shape


def view_as(flow: Any, node: Any, x: Shape, other: Shape) -> Shape:
    shape = Shape(regroup(x, other.sizes))
    for dim, wanted in zip(shape, other, strict=True):
        unify(dim, wanted)
    return shape


def flatten(flow: Any, node: Any, x: Shape, start: int = 0, end: int = -1) -> Shape:
    if not x:
        return Shape([()])
    start, end = int(start) % len(x), int(end) % len(x)
    return Shape((*x[:start], tuple(axis for dim in x[start : end + 1] for axis in dim), *x[end + 1 :]))


def unflatten(flow: Any, node: Any, x: Shape, dim: int, sizes: Sequence[int]) -> Shape:
    dim = int(dim) % len(x)
    wanted = node.meta["val"].shape[dim : dim + len(sizes)]
    parts = regroup([x[dim]], wanted)
    for count, part in zip(sizes, parts, strict=True):
        if int(count) != -1:
            flow.equations.equate(count, part, "a view")
    return Shape((*x[:dim], *parts, *x[dim + 1 :]))


def squeeze(flow: Any, node: Any, x: Shape, dim: Any = None) -> Shape:
    chosen = (
        range(len(x))
        if dim is None
        else [int(each) % max(len(x), 1) for each in (dim if isinstance(dim, list | tuple) else [dim])]
    )
    return Shape(each for place, each in enumerate(x) if place not in chosen or size(each) != 1)


def unsqueeze(flow: Any, node: Any, x: Shape, dim: int) -> Shape:
    dim = int(dim) % (len(x) + 1)
    return Shape((*x[:dim], (), *x[dim:]))


def permute(flow: Any, node: Any, x: Shape, order: Sequence[int]) -> Shape:
    return Shape(x[int(place)] for place in order)


def transpose(flow: Any, node: Any, x: Shape, first: int = 0, second: int = 1) -> Shape:
    """Also `t`, where vectors stay."""
    dims = list(x)
    if len(x) > 1:
        dims[int(first)], dims[int(second)] = dims[int(second)], dims[int(first)]
    return Shape(dims)


def reverse(flow: Any, node: Any, x: Shape) -> Shape:
    """`x.T`."""
    return Shape(x[::-1])


def move(flow: Any, node: Any, x: Shape, source: Any, target: Any) -> Shape:
    """`movedim`."""
    sources, targets = (
        [int(each) % len(x) for each in (v if isinstance(v, list | tuple) else [v])] for v in (source, target)
    )
    order = [place for place in range(len(x)) if place not in sources]
    for place, where in sorted(zip(sources, targets, strict=True), key=lambda pair: pair[1]):
        order.insert(where, place)
    return Shape(x[place] for place in order)


def expand(flow: Any, node: Any, x: Shape, sizes: Sequence[int], *_: Any, **__: Any) -> Shape:
    """A dim of size 1 becomes a new axis; the others must match what the code says."""
    dims = [()] * (len(sizes) - len(x)) + list(x)
    for place, (count, wanted) in enumerate(zip(sizes, node.meta["val"].shape, strict=True)):
        if int(count) == -1:
            continue
        if size(dims[place]) != wanted:
            dims[place] = fresh(wanted)
        flow.equations.equate(count, dims[place], "an expansion")
    return Shape(dims)


def expand_as(flow: Any, node: Any, x: Shape, other: Shape) -> Shape:
    dims = [()] * (len(other) - len(x)) + list(x)
    return Shape(broadcast(pair) for pair in zip(dims, other, strict=True))


def repeat(flow: Any, node: Any, x: Shape, times: Sequence[int]) -> Shape:
    """Also `tile`: `n` copies end to end are an outer axis."""
    dims, times = [()] * (len(times) - len(x)) + list(x), [1] * (len(x) - len(times)) + list(times)
    return Shape(_copies(flow, count) + dim for count, dim in zip(times, dims, strict=True))


def repeat_interleave(flow: Any, node: Any, x: Shape, times: int, dim: int | None = None, **_: Any) -> Shape:
    """Each unit `n` times in a row: an inner axis."""
    if dim is None:
        x, dim = flatten(flow, node, x), 0
    dims = list(x)
    dims[int(dim)] = dims[int(dim)] + _copies(flow, times)
    return Shape(dims)


def _copies(flow: Any, count: int) -> Dim:
    axis = fresh(int(count))
    flow.equations.equate(count, axis, "a repetition")
    return axis


def cat(flow: Any, node: Any, tensors: Sequence[Shape], dim: int = 0) -> Shape:
    filled = [shape for shape in tensors if shape.sizes != (0,)]
    place = int(dim) % len(filled[0])
    columns = list(zip(*filled, strict=True))
    dims = [concatenate(column) if i == place else broadcast(column) for i, column in enumerate(columns)]
    return Shape(dims)


def stack(flow: Any, node: Any, tensors: Sequence[Shape], dim: int = 0) -> Shape:
    dims = [broadcast(column) for column in zip(*tensors, strict=True)]
    dims.insert(int(dim) % (len(dims) + 1), fresh(len(tensors), "number of stacked tensors"))
    return Shape(dims)


def split(flow: Any, node: Any, x: Shape, counts: Any, dim: int = 0) -> list[Shape]:
    """Pieces of the sizes that the code says; one size for all makes the pieces one axis."""
    pieces = _pieces(x, int(dim), [value.shape[int(dim)] for value in node.meta["val"]])
    same = not isinstance(counts, list | tuple)
    if same and len({size(piece) for piece in pieces}) == 1:
        for piece in pieces[1:]:
            unify(pieces[0], piece)
    for piece, count in zip(pieces, [counts] * len(pieces) if same else counts, strict=True):
        flow.equations.equate(count, piece, "a split")
    return [_replaced(x, int(dim), piece) for piece in pieces]


def chunk(flow: Any, node: Any, x: Shape, _: int, dim: int = 0) -> list[Shape]:
    """A number of equal pieces: they keep equal sizes, so they are one axis."""
    pieces = _pieces(x, int(dim), [value.shape[int(dim)] for value in node.meta["val"]])
    for piece in pieces[1:]:
        if size(piece) == size(pieces[0]):
            unify(pieces[0], piece)
        else:
            freeze(x[int(dim)], "chunks of different sizes")
    return [_replaced(x, int(dim), piece) for piece in pieces]


def _pieces(x: Shape, dim: int, sizes: Sequence[int]) -> list[Dim]:
    rest, pieces = x[dim], []
    for count in sizes:
        piece, rest = cut(rest, count)
        pieces.append(piece)
    return pieces


def _replaced(x: Shape, dim: int, piece: Dim) -> Shape:
    dims = list(x)
    dims[dim] = piece
    return Shape(dims)


def glu(flow: Any, node: Any, x: Shape, dim: int = -1) -> Shape:
    """The first half times the sigmoid of the second."""
    first, second = _pieces(x, int(dim), [size(x[int(dim)]) // 2] * 2)
    unify(first, second)
    return _replaced(x, int(dim), first)


def unbind(flow: Any, node: Any, x: Shape, dim: int = 0) -> list[Shape]:
    dim = int(dim) % len(x)
    freeze(x[dim], "its places have names")
    return [Shape(each for place, each in enumerate(x) if place != dim)] * size(x[dim])


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "_reshape_alias"), view),
    **dict.fromkeys(("view_as", "reshape_as"), view_as),
    "flatten": flatten,
    "unflatten": unflatten,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "permute": permute,
    **dict.fromkeys(("transpose", "t", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("numpy_T", "mT"), reverse),
    **dict.fromkeys(("movedim", "moveaxis"), move),
    **dict.fromkeys(("expand", "broadcast_to"), expand),
    "expand_as": expand_as,
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(("split", "split_with_sizes"), split),
    "chunk": chunk,
    "glu": glu,
    "unbind": unbind,
}
