"""How long the model takes under any plan: a table of its operations at several widths, agreed with the whole model.

Each operation of the trace runs alone at a grid of widths; what it takes at a plan's widths is interpolated. The sum is
not the whole (Python, moves of data, caches), so it is corrected by what the dense model takes. All numbers are kept on
disk, by machine, so that they are measured once and a run that is resumed decides as it did before.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from hf_prune.cache import cache_dir
from hf_prune.graph.axes import Axis, Cat, Dim, Shape, flat, leaves
from hf_prune.graph.rules import name_of
from hf_prune.graph.trace import Inputs, arguments, distinct_tensors
from hf_prune.timing import compare, machine
from hf_prune.types import Plan

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Widths at which operations are measured; between them, and below, latency is taken as linear."""

CORRECTIONS = 4
"""Plans that are measured, at most, until one meets a goal."""

TOLERANCE = 0.05
"""How far from the goal, as a share of it, a measured latency may be."""

SKIPPED = (
    "transpose t permute to contiguous detach alias view view_as reshape flatten unflatten squeeze unsqueeze expand "
    "expand_as split split_with_sizes chunk unbind slice select narrow getitem dropout"
).split()
"""Operations that compute nothing by themselves: they are in the correction."""

Measure = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, float]]
"""Functions by name -> milliseconds of each."""

Sizes = Mapping[Axis, int]
"""Units of axes that are not whole."""


def time_in_turn(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians of interleaved rounds, with the threads that torch has now."""
    times = compare(functions, rounds=7, threads=None, least_ms=2.0)
    return {name: timing.median_ms for name, timing in times.items()}


class Table:
    """Numbers by name in one file of this machine, torch version, thread count and device."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.environment = f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {device.type}"
        name = hashlib.sha256(self.environment.encode()).hexdigest()[:16]
        self.path = (folder or cache_dir() / "latency") / f"{name}.json"
        self.numbers: dict[str, float] = self._read()

    def _read(self) -> dict[str, float]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(name): float(value) for name, value in content["milliseconds"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return {}  # none yet, or damaged: what it says can be measured again

    def keep(self, numbers: Mapping[str, float]) -> None:
        """Add `numbers`; other processes may add theirs at the same time."""
        self.numbers = {**self._read(), **self.numbers, **numbers}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps({"environment": self.environment, "milliseconds": self.numbers}), encoding="utf-8")
        fresh.replace(self.path)


@dataclass(frozen=True)
class _Slot:
    """A tensor argument of an operation: its dims and dtype."""

    shape: Shape
    dtype: torch.dtype

    def at(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(count(dim, sizes) for dim in self.shape)


class _Work:
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
            if not isinstance(value, _Slot):
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


class Latency:
    """Milliseconds of a forward pass on the example inputs, for any plan."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        flow: Any,
        axes: Mapping[str, Axis],
        measure: Measure | None = None,
        folder: Path | None = None,
    ) -> None:
        """Measures what the table in `folder` lacks; `model` is plain and dense, and copied."""
        self.model, self.axes, self.measure = copy.deepcopy(model).eval(), axes, measure or time_in_turn
        self.inputs, self.device = inputs, next(model.parameters()).device
        self.table = Table(self.device, folder)
        work = _work_of(flow, set(axes.values()))
        known = _on_first_process(lambda: self._measured(work))
        self.dense: float = known[self._name]
        able = [each for each in work if all(each.key(point) in known for point in each.points())]
        runs = [(each, _rising(each, known)) for each in able]
        self._work = [(each, table) for each, table in runs if each.widths]
        whole = sum(table[-1] for _, table in runs)
        # What lies beside the operations does not shrink with them; operations that take less in company do.
        self._factor = min(1.0, self.dense / whole) if whole else 1.0
        self._rest = self.dense - self._factor * sum(table[-1] for _, table in self._work)

    @property
    def _name(self) -> str:
        shapes = {name: tuple(tensor.shape) for name, tensor in distinct_tensors(self.model).items()}
        given = [
            (tuple(each.shape), str(each.dtype)) for each in pytree.tree_leaves(self.inputs) if isinstance(each, Tensor)
        ]
        dtype = next(self.model.parameters()).dtype
        return f"{type(self.model).__name__} {_digest(repr((sorted(shapes.items()), given, dtype)))}"

    def _measured(self, work: Iterable[_Work]) -> dict[str, float]:
        """Numbers of the dense model and of all operations that can run alone, from the table or measured now."""
        for each in work:
            jobs = {each.key(point): point for point in each.points()}
            missing = {name: point for name, point in jobs.items() if name not in self.table.numbers}
            if missing:
                self.table.keep(self._run_alone(each, missing))
        if self._name not in self.table.numbers:
            self.table.keep(self.measure({self._name: self._forward(self.model)}))
        return self.table.numbers

    @torch.no_grad()
    def _run_alone(self, work: _Work, points: Mapping[str, Sizes]) -> Mapping[str, float]:
        try:
            jobs = {name: work.job(sizes, self.device) for name, sizes in points.items()}
            for job in jobs.values():
                job()
        except (RuntimeError, TypeError, ValueError, IndexError):
            return {}  # it cannot run out of its place, and counts in the correction
        return self.measure(jobs)

    def _forward(self, model: nn.Module) -> Callable[[], Any]:
        args, kwargs = arguments(model, self.inputs)
        return torch.no_grad()(lambda: model(*args, **kwargs))

    def at(self, plan: Plan | None = None) -> float:
        """What the model would take under `plan`."""
        sizes = {self.axes[name]: int(keep.sum()) for name, keep in (plan or {}).items()}
        return self._rest + self._factor * sum(work.interpolate(table, sizes) for work, table in self._work)

    def correction(
        self, goal: float, choose: Callable[[float], Plan], shrink: Callable[[nn.Module, Plan], Any]
    ) -> float:
        """What to multiply `goal`, a share of the dense latency, by, so that the plan that `choose` makes measures it.

        choose: share of the dense latency as estimated -> plan.  shrink: carries a plan out on a copy of the model.
        """
        plan = choose(goal)
        sizes = {name: int(keep.sum()) for name, keep in plan.items()}
        name = f"correction of {self._name} {goal} {_digest(repr(sorted(sizes.items())))}"

        def find() -> float:
            if name not in self.table.numbers:
                self.table.keep({name: self._corrected(goal, plan, choose, shrink)})
            return self.table.numbers[name]

        return _on_first_process(find)

    def _corrected(
        self, goal: float, plan: Plan, choose: Callable[[float], Plan], shrink: Callable[[nn.Module, Plan], Any]
    ) -> float:
        factor, best = 1.0, (float("inf"), 1.0, 1.0)
        for _ in range(CORRECTIONS):
            shrunk = copy.deepcopy(self.model)
            shrink(shrunk, plan)
            times = self.measure({"dense": self._forward(self.model), "shrunk": self._forward(shrunk)})
            share = times["shrunk"] / times["dense"]
            best = min(best, (abs(share / goal - 1.0), factor, share))
            if best[0] <= TOLERANCE / 2:
                break
            factor *= goal / share
            plan = choose(goal * factor)
        if best[0] > TOLERANCE:
            warnings.warn(
                f"target_latency={goal}: {best[2]:.3f} was the nearest of {CORRECTIONS} measured plans: the machine is "
                "busy, or single units are too large. Repeat on a quiet machine.",
                stacklevel=2,
            )
        return best[1]


def _rising(work: _Work, known: Mapping[str, float]) -> list[float]:
    """The measured grid of `work`, where no point takes longer than a wider one: noise must not pay for narrowing."""
    table = torch.tensor([known[work.key(point)] for point in work.points()], dtype=torch.float64)
    table = table.view([len(FRACTIONS)] * len(work.widths))
    for dim in range(table.ndim):
        table = table.flip(dim).cummin(dim).values.flip(dim)
    return table.flatten().tolist()


def _work_of(flow: Any, free: set[Axis]) -> list[_Work]:
    """The operations of the trace that compute from tensors."""
    found = []
    for node in flow.trace.graph.nodes:
        if node.op == "call_function" and node in flow.live and name_of(node.target) not in SKIPPED:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda each: _slot(flow, each))
            if any(_slots((args, kwargs))):
                found.append(_Work(node, args, kwargs, free))
    return found


def _slot(flow: Any, node: Node) -> Any:
    shape, value = flow.shapes.get(node), node.meta.get("val")
    if node in flow.trace.tensors:
        shape = flow.tensors[flow.trace.tensors[node]]
    return _Slot(shape, value.dtype) if isinstance(shape, Shape) and isinstance(value, Tensor) else None


def _mapped(value: Any, make: Callable[[Any], Any]) -> Any:
    """`value` with `make` applied to everything inside."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, make) for each in value) if type(value) in (list, tuple) else value
    return {key: _mapped(each, make) for key, each in value.items()} if isinstance(value, dict) else make(value)


def _slots(value: Any) -> list[_Slot]:
    return [
        each for each in pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, _Slot)) if isinstance(each, _Slot)
    ]


def _constants(value: Any) -> list[Any]:
    leaves = pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, _Slot))
    return [each for each in leaves if not isinstance(each, _Slot)]


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


def _on_first_process(find: Callable[[], Any]) -> Any:
    """What `find` gives on the first process, for all: times differ between processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return find()
    answer = [find() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(answer)
    return answer[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
