"""The latency goal under a measurer that counts: nothing here depends on how fast the machine is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hf_prune
from hf_prune import (
    GateDecoratorConfig,
    MagnitudeConfig,
    PruneConfig,
    PruneError,
    PruneNetConfig,
    Pruner,
    ResRepConfig,
)
from hf_prune.graph import latency, shrink, trace
from hf_prune.graph.latency import Latency
from hf_prune.tiny_models import tiny_image_model, tiny_text_model

PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}


class Counting:
    """Milliseconds by counted operations; a whole model takes them to some power, as if caches helped larger ones."""

    def __init__(self, power: float = 1.0) -> None:
        self.power, self.plans, self.names = power, 0, []

    def __call__(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        self.names += functions
        self.plans += "shrunk" in functions
        return {
            name: self.count(function) ** (self.power if name in ("dense", "shrunk") else 1.0)
            for name, function in functions.items()
        }

    @staticmethod
    def count(function: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() * 1e-6


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    return lambda: model.eval()(**inputs)


def share(model: nn.Module, dense: nn.Module, inputs: Mapping[str, Tensor], power: float = 1.0) -> float:
    return (Counting.count(forward(model, inputs)) / Counting.count(forward(dense, inputs))) ** power


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counting:
    """What every run here measures with, and keeps in a folder of the test's own."""
    measurer = Counting()
    monkeypatch.setattr(latency, "time_in_turn", measurer)
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    return measurer


@pytest.mark.parametrize("kind", ["image", "text"])
def test_estimates_are_what_shrunk_models_take(kind: str) -> None:
    """Exact here, where cost is linear in every width."""
    model = tiny_image_model() if kind == "image" else tiny_text_model(hidden_size=32, num_attention_heads=8)
    graph = trace(model.eval(), PIXELS if kind == "image" else None)
    assert graph.latency.at() == pytest.approx(graph.latency.dense)
    for fraction in (0.2, 0.45, 0.8):
        plan = {n: torch.arange(g.size) < fraction * g.size for n, g in graph.groups.items() if not g.normalised}
        shrunk = copy.deepcopy(model)
        shrink(shrunk, graph, plan)
        found = graph.latency.at(plan) / graph.latency.dense
        assert found == pytest.approx(share(shrunk, model, graph.inputs), rel=1e-6)


def test_the_sum_is_corrected_to_the_whole(tmp_path: Path) -> None:
    """What the whole takes beside its operations does not shrink; what they take less in company shrinks with them."""
    model = tiny_image_model()
    graph = trace(model, PIXELS)

    def with_whole(factor: float) -> Latency:
        def measure(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
            return {
                name: Counting.count(f) * (factor if name.startswith("ResNet") else 1.0)
                for name, f in functions.items()
            }

        return Latency(model, graph.inputs, graph.flow, graph.axes, measure, tmp_path / str(factor))

    half = {name: torch.arange(group.size) < group.size / 2 for name, group in graph.groups.items()}
    plain, more, less = (with_whole(factor) for factor in (1.0, 3.0, 0.5))
    assert more.at(half) - plain.at(half) == pytest.approx(2.0 * plain.dense)
    assert less.at(half) == pytest.approx(0.5 * plain.at(half))
    assert more.at() == pytest.approx(more.dense) and less.at() == pytest.approx(less.dense)


def test_the_table_is_kept_on_disk(tmp_path: Path) -> None:
    graph = trace(tiny_image_model(), PIXELS)
    first = graph.latency
    assert first.table.path.is_relative_to(tmp_path)

    def fail(functions: Any) -> Any:
        raise AssertionError(f"{list(functions)} were measured again")

    model = tiny_image_model(seed=1)
    again = Latency(model, graph.inputs, graph.flow, graph.axes, fail)
    plan = {name: torch.arange(group.size) % 2 == 0 for name, group in graph.groups.items()}
    assert again.at(plan) == first.at(plan)
    with pytest.raises(AssertionError, match="measured again"):
        Latency(
            model,
            {"pixel_values": torch.zeros(4, 3, 16, 16)},
            trace(model, {"pixel_values": torch.zeros(4, 3, 16, 16)}).flow,
            graph.axes,
            fail,
        )
    first.table.path.write_text("[1, 2", encoding="utf-8")
    assert Latency(model, graph.inputs, graph.flow, graph.axes, Counting()).at(plan) == first.at(plan)


def test_noise_does_not_pay_for_narrowing(tmp_path: Path) -> None:
    """A narrow operation that measured slower than a wider one counts as fast as that."""
    graph, slow = trace(tiny_image_model(), PIXELS), torch.tensor([9.0, 1.0, 2.0, 3.0])

    def measure(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        rows = {name: float(slow[place % 4]) for place, name in enumerate(functions)}
        return rows if len(rows) > 1 else dict.fromkeys(rows, 100.0)

    found = Latency(graph.model, graph.inputs, graph.flow, graph.axes, measure, tmp_path)
    least = {name: torch.arange(group.size) < 1 for name, group in graph.groups.items()}
    assert found.at(least) < found.at() == found.dense


def test_operations_that_cannot_run_alone_count_in_the_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(self: Any, sizes: Any, device: Any) -> Callable[[], Any]:
        raise RuntimeError("not out of its place")

    monkeypatch.setattr(latency.Work, "job", job)
    graph = trace(tiny_image_model(), PIXELS)
    plan = {name: torch.arange(group.size) % 2 == 0 for name, group in graph.groups.items()}
    assert graph.latency.at(plan) == graph.latency.at() == graph.latency.dense > 0


@pytest.mark.parametrize(("power", "scope"), [(1.0, "global"), (0.7, "global"), (1.3, "per_group")])
def test_the_goal_is_met_as_measured(counting: Counting, power: float, scope: str) -> None:
    """Also where the whole does not follow its parts: few plans are measured until one fits."""
    counting.power = power
    model, dense = tiny_image_model(hidden_sizes=[32, 64]), tiny_image_model(hidden_sizes=[32, 64])
    hf_prune.prune(model, MagnitudeConfig(target_latency=0.6, scope=scope), PIXELS)
    assert share(model, dense, PIXELS, power) == pytest.approx(0.6, rel=0.05)
    assert counting.plans <= latency.CORRECTIONS


def test_a_goal_below_the_floors_raises() -> None:
    model = tiny_image_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match=r"target_latency=0\.001 cannot be reached"):
        hf_prune.prune(model, MagnitudeConfig(target_latency=0.001), PIXELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_machine_on_which_nothing_fits_is_told(monkeypatch: pytest.MonkeyPatch, counting: Counting) -> None:
    def busy(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        return {**counting(functions), **({"shrunk": 1.0, "dense": 1.0} if "shrunk" in functions else {})}

    monkeypatch.setattr(latency, "time_in_turn", busy)
    with pytest.warns(UserWarning, match="was the nearest of 4 measured plans"):
        hf_prune.prune(tiny_image_model(), MagnitudeConfig(target_latency=0.6), PIXELS)


def test_a_measured_plan_stays_and_a_resumed_run_finds_it_again(counting: Counting) -> None:
    def run() -> Pruner:
        model = tiny_image_model(hidden_sizes=[32, 64])
        pruner = Pruner(model, MagnitudeConfig(target_latency=0.6, end=0.5), PIXELS)
        pruner.attach()
        for step in range(6):
            pruner.step(step, 10)
        return pruner

    pruner, measured = run(), counting.plans
    plan = {name: keep.clone() for name, keep in pruner.plan.items()}
    with torch.no_grad():
        for parameter in pruner.model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    pruner.step(6, 10)
    assert all(torch.equal(keep, plan[name]) for name, keep in pruner.plan.items())
    assert all(torch.equal(keep, plan[name]) for name, keep in run().plan.items())
    assert counting.plans == measured > 0


def test_resrep_takes_the_goal(counting: Counting) -> None:
    with pytest.warns(UserWarning, match="not forgotten yet"):
        _reach(ResRepConfig(target_latency=0.9, begin=0.0, end=0.5))


@pytest.mark.parametrize(
    "config",
    [
        GateDecoratorConfig(target_latency=0.9, tock_steps=1, tick_steps=1, ticks_per_tock=1, end=1.0),
        PruneNetConfig(target_latency=0.9, begin=0.0, fit_batches=2, variance_batches=2),
    ],
    ids=lambda config: config.method,
)
def test_other_methods_take_the_goal(counting: Counting, config: PruneConfig) -> None:
    _reach(config)


def _reach(config: PruneConfig) -> None:
    model, dense = tiny_image_model(hidden_sizes=[32, 64]), tiny_image_model(hidden_sizes=[32, 64])
    batches = [{**PIXELS, "labels": torch.tensor([0, 1])}] * 2
    pruner = Pruner(model, config, PIXELS, data=batches)
    pruner.attach()
    for step in range(5):
        pruner.step(step, 4)
    pruner.finalize()
    assert share(model, dense, PIXELS) == pytest.approx(0.9, rel=0.05)
