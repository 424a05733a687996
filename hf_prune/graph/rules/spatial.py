"""Operations over positions of an image or a sequence: channels pass, positions are new."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from hf_prune.graph.axes import Dim, Shape, freeze, fresh, size
from hf_prune.graph.dims import concatenate, divide, unify
from hf_prune.graph.rules.pointwise import Rule
from hf_prune.graph.traced_int import TracedInt


def places(rank: int) -> Rule:
    """Rule of pooling and resizing over the last `rank` dims."""

    def rule(flow: Any, node: Any, x: Shape, *_: Any, **__: Any) -> Any:
        for dim in x[-rank:]:
            freeze(dim, "position")
        return _results(node, [*x[:-rank], *(fresh(count, "position") for count in _sizes(node)[-rank:])])

    return rule


def windows(rank: int) -> Rule:
    """Rule of pooling with a window of given size: a window of one place leaves its dim alone."""

    def rule(flow: Any, node: Any, x: Shape, kernel: Sequence[int], *_: Any, **__: Any) -> Any:
        dims = list(x)
        for place in range(-rank, 0):
            width, count = int(kernel[place % len(kernel)]), _sizes(node)[place]
            if width != 1 or count != size(x[place]):
                freeze(x[place], "position")
                dims[place] = fresh(count, "position")
        return _results(node, dims)

    return rule


def _sizes(node: Any) -> tuple[int, ...]:
    """Shape of the first result."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, tuple | list) else value).shape)


def _results(node: Any, dims: Sequence[Dim]) -> Shape | list[Shape]:
    """One shape for each result."""
    value = node.meta["val"]
    return [Shape(dims)] * len(value) if isinstance(value, tuple | list) else Shape(dims)


def pad(flow: Any, node: Any, x: Shape, widths: Sequence[int], mode: str = "constant", *_: Any) -> Shape:
    """Constants beside a dim are a new part that stays; a mirror or copy of its edge pins the dim."""
    shape = list(x)
    for place in range(len(widths) // 2):
        before, after = widths[2 * place : 2 * place + 2]
        position = len(x) - 1 - place
        if int(before) or int(after):
            shape[position] = _padded(x[position], before, after, mode in ("constant", 0))
    return Shape(shape)


def _padded(dim: Dim, before: int, after: int, constant: bool) -> Dim:
    computed = isinstance(before, TracedInt) or isinstance(after, TracedInt)
    if computed or not constant or before < 0 or after < 0:
        freeze(dim, "padding that depends on it")
    if before < 0 or after < 0:
        return fresh(size(dim) + before + after, "padding that depends on it")
    return concatenate([fresh(int(before), "padding"), dim, fresh(int(after), "padding")])


def constant_pad(flow: Any, node: Any, x: Shape, widths: Sequence[int], *_: Any) -> Shape:
    return pad(flow, node, x, widths)


def unfold_image(flow: Any, node: Any, x: Shape, kernel: Sequence[int], *_: Any, **__: Any) -> Shape:
    """`im2col`: `(C, H, W)` to `(C * k * k, L)`."""
    channels = x[-3] + fresh(prod(map(int, kernel)), "kernel")
    return Shape((*x[:-3], channels, fresh(node.meta["val"].shape[-1], "position")))


def fold_image(flow: Any, node: Any, x: Shape, out: Sequence[int], kernel: Sequence[int], *_: Any, **__: Any) -> Shape:
    """`col2im`: the inverse of `unfold_image`."""
    channels = _outer(x[-2], prod(map(int, kernel)))
    return Shape((*x[:-2], channels, *(fresh(int(count), "position") for count in out)))


def pixel_shuffle(flow: Any, node: Any, x: Shape, factor: int) -> Shape:
    """`(C * r * r, H, W)` to `(C, H * r, W * r)`."""
    channels = _outer(x[-3], int(factor) ** 2)
    return Shape((*x[:-3], channels, *(fresh(size(dim) * int(factor), "position") for dim in x[-2:])))


def pixel_unshuffle(flow: Any, node: Any, x: Shape, factor: int) -> Shape:
    channels = x[-3] + fresh(int(factor) ** 2, "block of pixels")
    return Shape((*x[:-3], channels, *(fresh(size(dim) // int(factor), "position") for dim in x[-2:])))


def grid_sample(flow: Any, node: Any, x: Shape, grid: Shape, *_: Any, **__: Any) -> Shape:
    """`(N, C, *places)` read at `(N, *new places, coordinates)`."""
    unify(x[0], grid[0])
    for dim in (*x[2:], grid[-1]):
        freeze(dim, "position")
    return Shape((*x[:2], *grid[1:-1]))


def _outer(channels: Dim, block: int) -> Dim:
    """The outer factor of `channels = (outer, block)`; the block, a piece of the image, is frozen."""
    divided = divide(channels, block)
    if divided is None:
        freeze(channels, "pixels of a block")
        return fresh(size(channels) // block, "pixels of a block")
    freeze(divided[1], "pixels of a block")
    return divided[0]


def channel_shuffle(flow: Any, node: Any, x: Shape, groups: int) -> Shape:
    """`(g, c)` to `(c, g)`."""
    divided = divide(x[1], size(x[1]) // int(groups))
    if divided is None:
        freeze(x[1], "shuffled across its blocks")
        return x
    flow.equations.equate(groups, divided[0], "channel_shuffle")
    return Shape((x[0], divided[1] + divided[0], *x[2:]))


RULES: dict[str, Rule] = {
    "pad": pad,
    "constant_pad_nd": constant_pad,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), grid_sample),
    "im2col": unfold_image,
    "col2im": fold_image,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    **{f"{kind}_pool{rank}d": windows(rank) for kind in ("max", "avg") for rank in (1, 2, 3)},
    **{f"max_pool{rank}d_with_indices": windows(rank) for rank in (2, 3)},
    **{f"adaptive_avg_pool{rank}d": places(rank) for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{rank}d": places(rank) for rank in (1, 2, 3)},
    **{
        f"upsample_{kind}{rank}d": places(rank)
        for kind in ("nearest", "nearest_exact", "_nearest_exact")
        for rank in (1, 2, 3)
    },
    "upsample_linear1d": places(1),
    "upsample_bilinear2d": places(2),
    "_upsample_bilinear2d_aa": places(2),
    "upsample_bicubic2d": places(2),
    "_upsample_bicubic2d_aa": places(2),
    "upsample_trilinear3d": places(3),
}
