"""How long calls take, measured in turn in one process: whatever else the machine does slows all of them alike."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_prune.types import PruneError

Clock = Callable[[], float]
"""Seconds since some moment."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over all rounds: the median, the lowest and the highest."""

    median_ms: float
    low_ms: float
    high_ms: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """From one number a round."""
        return cls(statistics.median(milliseconds), min(milliseconds), max(milliseconds))


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    threads: int | None = 1,
    least_ms: float = 0.0,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Times of one call of each function; ratios of their medians are what a busy machine hardly moves.

    Each is called once before anything is timed. Every round times each, beginning with another one than the round
    before.

    rounds: samples of each function.
    threads: of torch's CPU operations meanwhile; None leaves them as they are.
    least_ms: a function that is faster is called several times a sample, so that a sample lasts at least this long.
    """
    if rounds < 1 or not functions:
        raise PruneError(f"timing needs a function and at least 1 round, got {len(functions)} and rounds={rounds}.")
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _threads(threads), _no_collection():
        calls = {name: _calls_a_sample(functions[name], least_ms, clock) for name in names}
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_sample(functions[name], calls[name], clock))
    return {name: Timing.of(values) for name, values in samples.items()}


def _calls_a_sample(function: Callable[[], Any], least_ms: float, clock: Clock) -> int:
    function()
    if least_ms <= 0:
        return 1
    once = _sample(function, 1, clock)
    return max(1, round(least_ms / once)) if once > 0 else 1000


def _sample(function: Callable[[], Any], calls: int, clock: Clock) -> float:
    """Milliseconds of one call, as a mean over `calls`."""
    _synchronize()
    begin = clock()
    for _ in range(calls):
        function()
    _synchronize()
    return (clock() - begin) * 1e3 / calls


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def machine() -> str:
    """What computes: the accelerator's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()
