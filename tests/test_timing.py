"""Measuring under a clock that the test moves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from hf_prune import PruneError
from hf_prune.timing import Timing, compare, machine


class FakeClock:
    """Stands still unless somebody works."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function that takes each of the given times in turn, the last one from then on."""
        times = list(seconds)

        def function() -> None:
            self.calls.append(name)
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return function


def test_median_and_range_of_each_function() -> None:
    clock = FakeClock()
    functions = {"a": clock.work("a", 9.0, 0.003, 0.001, 0.002), "b": clock.work("b", 0.5)}
    assert compare(functions, rounds=3, clock=clock) == {
        "a": Timing(pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0)),
        "b": Timing(*[pytest.approx(500.0)] * 3),
    }


def test_rounds_are_interleaved_and_begin_with_another_each_time() -> None:
    clock = FakeClock()
    compare({name: clock.work(name, 0.1) for name in "abc"}, rounds=3, clock=clock)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab"


def test_fast_functions_are_called_several_times_a_sample() -> None:
    clock = FakeClock()
    times = compare(
        {"fast": clock.work("fast", 1e-3), "slow": clock.work("slow", 1.0)}, rounds=2, least_ms=5, clock=clock
    )
    assert clock.calls.count("fast") == 2 + 2 * 5 and clock.calls.count("slow") == 2 + 2
    assert times["fast"].median_ms == pytest.approx(1.0)


def test_threads_and_collection_are_put_back_where_a_function_fails() -> None:
    threads = torch.get_num_threads()

    def fail() -> None:
        assert torch.get_num_threads() == threads + 1 and not gc.isenabled()
        raise KeyError("gone")

    with pytest.raises(KeyError):
        compare({"a": fail}, threads=threads + 1)
    assert torch.get_num_threads() == threads and gc.isenabled()


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(PruneError, match="at least 1 round"):
        compare({"a": lambda: None}, rounds=0)
    with pytest.raises(PruneError, match="a function"):
        compare({})


def test_the_machine_has_a_name() -> None:
    assert machine()
