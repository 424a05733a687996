"""Operations of a trace that can run alone at other widths, and what lies between the widths that were measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from hf_prune.graph.axes import Axis, Cat, Dim, Shape, flat, leaves
from hf_prune.graph.rules import name_of

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Widths at which operations are measured; between them, and below, latency is taken as linear."""

SKIPPED = (
    "transpose t permute to contiguous detach alias view view_as reshape flatten unflatten squeeze unsqueeze expand "
    "expand_as split split_with_sizes chunk unbind slice select narrow getitem dropout"
).split()
"""Operations that compute nothing by themselves: they are in the correction."""

Sizes = Mapping[Axis, int]
"""Units of axes that are not whole."""


@dataclass(frozen=True)
class Slot:
    """A tensor argument of an operation: its dims and dtype."""

    shape: Shape
    dtype: torch.dtype

    def at(self, sizes: Sizes) -> tuple[int, ...]:
        """Its shape at those sizes."""
        return tuple(count(dim, sizes) for dim in self.shape)


class Work:
    """One operation that can run alone at other widths."""

    def __init__(self, node: Any, args: Any, kwargs: Any, free: set[Axis]) -> None:
        self.node, self.args, self.kwargs = node, args, kwargs
        self.slots = list(_slots((args, kwargs)))
        self.widths = _widths([dim for slot in self.slots for dim in slot.shape], free)
        self.grid = [[dict(_scaled(width, fraction, free)) for fraction in FRACTIONS] for width in self.widths]

    def points(self) -> list[dict[Axis, int]]:
        """The grid: sizes at every combination of fractions, the last width running fastest."""
        return [
            {a: n for each in combination for a, n in each.items()} for combination in itertools.product(*self.grid)
        ]

    def key(self, sizes: Sizes) -> str:
        """What is run: operation, shapes and settings."""
        shapes = " ".join(f"{str(slot.dtype).removeprefix('torch.')}{list(slot.at(sizes))}" for slot in self.slots)
        settings = [each for each in _constants((self.args, self.kwargs)) if each is not None]
        return f"{name_of(self.node.target)} {shapes} {settings}".replace(", ", ",")

    def job(self, sizes: Sizes, device: torch.device) -> Callable[[], Any]:
        """A call of the operation on tensors of that size."""
        made: dict[int, Tensor] = {}

        def make(value: Any) -> Any:
            if not isinstance(value, Slot):
                return value
            return made.setdefault(id(value), _tensor(value.at(sizes), value.dtype, device))

        args, kwargs = _mapped(self.args, make), _mapped(self.kwargs, make)
        args = _fitted(name_of(self.node.target), args)
        return lambda: self.node.target(*args, **kwargs)

    def interpolate(self, table: Sequence[float], sizes: Sizes) -> float:
        """Milliseconds at `sizes`, linear in every width between the points of the grid; never negative."""
        weights = [
            _weights([_share(width, at) for at in row], _share(width, sizes))
            for width, row in zip(self.widths, self.grid, strict=True)
        ]
        total = 0.0
        for choice in itertools.product(*[list(each.items()) for each in weights]):
            place, weight = 0, 1.0
            for index, factor in choice:
                place, weight = place * len(FRACTIONS) + index, weight * factor
            total += weight * table[place]
        return max(total, 0.0)


def work_of(flow: Any, free: set[Axis]) -> list[Work]:
    """The operations of the trace that compute from tensors."""
    found = []
    for node in flow.trace.graph.nodes:
        if node.op == "call_function" and node in flow.live and name_of(node.target) not in SKIPPED:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda each: _slot(flow, each))
            if any(_slots((args, kwargs))):
                found.append(Work(node, args, kwargs, free))
    return found


def _slot(flow: Any, node: Node) -> Any:
    shape, value = flow.shapes.get(node), node.meta.get("val")
    if node in flow.trace.tensors:
        shape = flow.tensors[flow.trace.tensors[node]]
    return Slot(shape, value.dtype) if isinstance(shape, Shape) and isinstance(value, Tensor) else None


def _mapped(value: Any, make: Callable[[Any], Any]) -> Any:
    """`value` with `make` applied to everything inside."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, make) for each in value) if type(value) in (list, tuple) else value
    return {key: _mapped(each, make) for key, each in value.items()} if isinstance(value, dict) else make(value)


def _slots(value: Any) -> list[Slot]:
    return [each for each in pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, Slot)) if isinstance(each, Slot)]


def _constants(value: Any) -> list[Any]:
    leaves = pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, Slot))
    return [each for each in leaves if not isinstance(each, Slot)]


def _fitted(name: str, args: Sequence[Any]) -> list[Any]:
    """`args` whose numbers follow the widths: groups of a convolution, the shape of a layer norm."""
    args = list(args)
    if name.startswith("conv") and len(args) > 6 and isinstance(args[6], int) and args[6] > 1:
        args[6] = args[0].shape[1] // args[1].shape[1]
    if name in ("layer_norm", "rms_norm") and len(args) > 2 and isinstance(args[2], Tensor):
        args[1] = list(args[2].shape)
    return args


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of ordinary size, positive, since variances are among them; indices are zero."""
    if dtype.is_floating_point:
        return torch.linspace(0.5, 1.5, torch.Size(shape).numel(), device=device).to(dtype).view(shape)
    return (
        torch.ones(shape, dtype=dtype, device=device)
        if dtype == torch.bool
        else torch.zeros(shape, dtype=dtype, device=device)
    )


def count(dim: Iterable[Axis], sizes: Sizes) -> int:
    """Number of indices of `dim` where some axes have other sizes."""
    return prod(
        sum(count(part, sizes) for part in axis.form.parts)
        if isinstance(axis.form, Cat)
        else sizes.get(axis, axis.size)
        for axis in flat(dim)
    )


def _widths(dims: Iterable[Dim], free: set[Axis]) -> list[list[Dim]]:
    """The dims that can become narrower, those together that have an axis in common."""
    widths: list[tuple[set[Axis], dict[tuple[Axis, ...], Dim]]] = []
    for dim in dims:
        axes = {axis for axis in leaves(dim) if axis in free}
        if not axes:
            continue
        joined = [each for each in widths if each[0] & axes]
        widths = [each for each in widths if not each[0] & axes]
        own = {tuple(flat(dim)): dim}
        widths.append(
            (axes.union(*(a for a, _ in joined)), {k: v for _, each in joined for k, v in each.items()} | own)
        )
    return [list(found.values()) for _, found in widths]


def _scaled(width: Iterable[Dim], fraction: float, free: set[Axis]) -> Iterator[tuple[Axis, int]]:
    """New sizes for axes of the dims of `width`: in a product its largest that can, in a concatenation each part."""
    for dim in width:
        able = [axis for axis in flat(dim) if any(leaf in free for leaf in leaves([axis]))]
        largest = max(able, key=lambda axis: axis.size)
        if isinstance(largest.form, Cat):
            yield from _scaled(
                [part for part in largest.form.parts if any(x in free for x in leaves(part))], fraction, free
            )
        else:
            yield largest, max(1, round(fraction * largest.size))


def _share(width: Iterable[Dim], sizes: Sizes) -> float:
    """What `width` keeps at `sizes`."""
    return sum(count(dim, sizes) for dim in width) / sum(count(dim, {}) for dim in width)


def _weights(grid: Sequence[float], at: float) -> dict[int, float]:
    """Places of the two points of `grid` around `at` -> their weights; beyond its ends, the line goes on."""
    right = next((place for place in range(1, len(grid)) if at <= grid[place]), len(grid) - 1)
    left = right - 1
    if grid[right] == grid[left]:
        return {right: 1.0}
    weight = (at - grid[left]) / (grid[right] - grid[left])
    return {left: 1.0 - weight, right: weight}
