"""How long the model takes under any plan: a table of its operations at several widths, agreed with the whole model.

Each operation of the trace runs alone at a grid of widths; what it takes at a plan's widths is interpolated. The sum is
not the whole (Python, moves of data, caches), so it is corrected by what the dense model takes. All numbers are kept on
disk, by machine, so that they are measured once and a run that is resumed decides as it did before.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_prune.cache import cache_dir
from hf_prune.graph.axes import Axis
from hf_prune.graph.trace import Inputs, arguments, distinct_tensors
from hf_prune.graph.work import FRACTIONS, Sizes, Work, work_of
from hf_prune.timing import compare, machine
from hf_prune.types import Plan

CORRECTIONS = 4
"""Plans that are measured, at most, until one meets a goal."""

TOLERANCE = 0.05
"""How far from the goal, as a share of it, a measured latency may be."""


Measure = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, float]]
"""Functions by name -> milliseconds of each."""


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
        work = work_of(flow, set(axes.values()))
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

    def _measured(self, work: Iterable[Work]) -> dict[str, float]:
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
    def _run_alone(self, work: Work, points: Mapping[str, Sizes]) -> Mapping[str, float]:
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


def _rising(work: Work, known: Mapping[str, float]) -> list[float]:
    """The measured grid of `work`, where no point takes longer than a wider one: noise must not pay for narrowing."""
    table = torch.tensor([known[work.key(point)] for point in work.points()], dtype=torch.float64)
    table = table.view([len(FRACTIONS)] * len(work.widths))
    for dim in range(table.ndim):
        table = table.flip(dim).cummin(dim).values.flip(dim)
    return table.flatten().tolist()


def _on_first_process(find: Callable[[], Any]) -> Any:
    """What `find` gives on the first process, for all: times differ between processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return find()
    answer = [find() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(answer)
    return answer[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
