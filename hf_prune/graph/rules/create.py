"""Operations that make a tensor from sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_prune.graph.axes import Shape, fresh
from hf_prune.graph.rules.pointwise import Rule


def filled(flow: Any, node: Any, sizes: Sequence[int], *_: Any, **__: Any) -> Shape:
    """`zeros(sizes)` and its kind: each dim is as large as the code asked for."""
    shape = Shape(fresh(int(count)) for count in sizes)
    for count, dim in zip(sizes, shape, strict=True):
        flow.equations.equate(count, dim, "a new tensor")
    return shape


def filled_like(flow: Any, node: Any, x: Shape, *_: Any, **__: Any) -> Shape:
    """A tensor of the shape of `x`; also `type_as`, which takes only the dtype of its second tensor."""
    return x


def new_filled(flow: Any, node: Any, x: Shape, sizes: Sequence[int], *_: Any, **__: Any) -> Shape:
    return filled(flow, node, sizes)


def counted(flow: Any, node: Any, *numbers: Any, **_: Any) -> Shape:
    """`arange`, `linspace`, `eye`: the values depend on the place, so no place can go."""
    shape = Shape(fresh(count, "places that are counted") for count in node.meta["val"].shape)
    for number in numbers:
        if isinstance(number, int):
            flow.equations.equate(number, shape[0] if int(number) == shape.sizes[0] else (), "a counted tensor")
    return shape


RULES: dict[str, Rule] = {
    **dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn"), filled),
    **dict.fromkeys(
        ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "type_as"), filled_like
    ),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), new_filled),
    **dict.fromkeys(("arange", "linspace", "eye"), counted),
}
