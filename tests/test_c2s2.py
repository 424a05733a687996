"""Acceptance of the C2S2 spec: identity, analytic selection, one layer at a time, the guard, planted dead channels."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from digits import digits
from gated_models import IMAGES, answer, scramble
from segmentation import segmentation_rows, tiny_segmentation_model
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_prune import C2S2Config, MagnitudeConfig, PruneError, Pruner, prune
from hf_prune.methods.c2s2 import SteadyAdam
from hf_prune.parts.channel_gates import fold_channels, passing
from hf_prune.testing import Run, tiny_cases
from hf_prune.tiny_models import tiny_image_model


def _attached(model: nn.Module, config: C2S2Config, inputs: Any = IMAGES, data: Any = ()) -> Pruner:
    pruner = Pruner(model, config, inputs, data=data)
    pruner.attach()
    return pruner


def test_new_gates_are_the_identity_and_real_ones_can_be_absorbed() -> None:
    model = scramble(tiny_image_model(depths=[2, 2]))
    dense = answer(model, IMAGES)
    pruner = _attached(model, C2S2Config(residual=True))
    assert torch.equal(answer(model, IMAGES), dense)
    gate = next(gate for gate in pruner.recipe.gates if len(gate.writers) > 1)
    with torch.no_grad():
        gate.function.scale.uniform_(0.1, 1.0)
    assert torch.equal(answer(model, IMAGES), dense), "the real form counts in selection alone"
    with passing({gate.function: gate.function.selected()}):
        real = answer(model, IMAGES)
    assert (real - dense).abs().max() > 1e-3
    for writer in gate.writers:
        fold_channels(model, writer, gate.function.scale)
    assert (answer(model, IMAGES) - real).abs().max() < 1e-5


class Sum(nn.Module):
    """`sum_c a_c x_c` through a gate on each term; one, and half the squared distance from the ungated sum."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.terms, self.total = nn.Linear(len(a), len(a), bias=False), nn.Linear(len(a), 1, bias=False)
        self.terms.weight.data, self.total.weight.data = torch.eye(len(a)), a[None].clone()
        self.a = a

    def forward(self, x: Tensor) -> SequenceClassifierOutput:
        y = self.total(self.terms(x))[:, 0]
        return SequenceClassifierOutput(loss=1.0 + 0.5 * (y - x @ self.a).square().sum(), logits=y)


@pytest.mark.parametrize("form", ["real", "straight_through"])
def test_analytic_selection(form: str) -> None:
    a, rho = torch.tensor([0.3, 0.6, 0.9, 1.0, 1.5, 2.0]), 0.5
    x = torch.eye(6)  # orthonormal inputs: v_c = max(0, 1 - rho / a_c^2)
    config = C2S2Config(
        include=("terms",), tau_total=1e9, begin=0.0, end=1.0, select_share=0.99, rounds=1, gate_lr=5e-3,
        sparsity_weight=rho, polar_weight=0.0, form=form,
    )  # fmt: skip
    pruner = _attached(Sum(a), config, {"x": x}, [{"x": x}])
    optimizer = pruner.wrap(torch.optim.SGD(pruner.model.parameters(), lr=0.0))
    pruner.step(0, 1000)
    for step in range(1, 1001):
        optimizer.zero_grad()
        pruner.batch_loss(pruner.model, {"x": x}).backward()
        optimizer.step()
        pruner.step(step, 1000)
    (gate,) = pruner.recipe.gates
    if form == "real":
        assert torch.allclose(gate.function.scale, (1 - rho / a.square()).clamp(min=0.0), atol=1e-3)
        assert torch.equal(gate.keep(), a.square() > 2 * rho)
    assert 0 < int(gate.keep().sum()) < 6


def test_penalty_by_hand() -> None:
    config = C2S2Config(begin=0.0, end=0.4, select_share=0.5, rounds=2, sparsity_weight=0.1, polar_weight=0.6)
    pruner = _attached(tiny_image_model(), config)
    layers, penalty = pruner.recipe.controller, pruner.recipe.penalties["gates"]
    assert len(layers.gates) == 2
    layers.gates[0].function.scale.data = torch.tensor([0.5, 1.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0])
    layers.observe({"progress": 0.05})  # half of the first layer's selection: kappa has come half way
    assert float(penalty(0.05)) == pytest.approx(0.1 * 1.7 + 0.3 * (0.25 + 0.16), abs=1e-6)
    layers.guards = 1  # its first round has passed: rho doubles
    assert float(penalty(0.05)) == pytest.approx(0.2 * 1.7 + 0.3 * (0.25 + 0.16), abs=1e-6)
    layers.observe({"progress": 0.15})
    assert float(penalty(0.15)) == 0.0 and layers.phase(0).name == "adapt"


def test_a_schedule_of_two_rounds_a_layer() -> None:
    config = C2S2Config(begin=0.2, end=0.6, select_share=0.5, rounds=2)
    schedule = _attached(tiny_image_model(), config).recipe.schedule  # layers at 0.2 and 0.4; guards 0.05 and 0.1 later
    due = [round(4 * schedule(progress)) for progress in (0.0, 0.2, 0.24, 0.25, 0.3, 0.39, 0.44, 0.45, 0.5, 1.0)]
    assert due == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4]


def test_one_layer_at_a_time() -> None:
    case = next(case for case in tiny_cases("c2s2") if case.variant == "tolerance")
    run, seen, masks = Run(case, steps=20), [], {}
    layers = run.pruner.recipe.controller
    for step in range(20):
        phase, selecting = run.pruner.phase.name, layers._selecting()
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.advance(to=step + 1)
        after = run.model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if phase == "select":
            host = f"{layers.gates[selecting].writers[0].host}.gates"
            assert moved <= {f"{host}.scale", f"{host}.keep"}
            assert f"{host}.scale" in moved or step not in (0, 8)
        else:
            assert not any(name.endswith("gates.scale") for name in moved)
            assert any(name.endswith("running_mean") for name in moved)
        for gate in layers.gates[: selecting if selecting is not None else layers.guards]:
            now = gate.keep().clone()
            assert torch.equal(masks.setdefault(gate.name, now), now), "a layer that is done stays as it is"
        seen.append(phase)
    assert seen[:8] == ["select"] * 4 + ["adapt"] * 4 and seen[8] == "select" and seen[-4:] == ["adapt"] * 4
    assert len(masks) == 2 and run.pruner.sparsity > 0


class Digits(nn.Module):
    """Two convolutions; the last four channels of each are planted dead: large, but never above zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.head(self.body(pixel_values).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def plant(self) -> Digits:
        for layer in (self.body[0], self.body[2]):
            layer.weight[12:] *= 5.0
            layer.bias[12:] = -1000.0
        return self


@cache
def _data() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[..., ::2, ::2].contiguous(), labels


def _rows(start: int, stop: int, size: int = 100) -> list[dict[str, Tensor]]:
    images, labels = _data()
    return [{"pixel_values": images[i : i + size], "labels": labels[i : i + size]} for i in range(start, stop, size)]


def _train(model: nn.Module, steps: int, pruner: Pruner | None = None) -> None:
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=3e-3)
    if pruner is not None:
        optimizer = pruner.wrap(optimizer)
        pruner.step(0, steps)
    batches = _rows(0, 1000, 50)
    for step in range(1, steps + 1):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        (pruner.batch_loss(model, batch) if pruner is not None else model(**batch).loss).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step(step, steps)


@cache
def _trained() -> Digits:
    model = Digits()
    _train(model, 150)
    model.plant()
    return model


def _loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.stack([model(**batch).loss.double() for batch in batches]).mean())


def _selection(tau: float, **settings: Any) -> tuple[Pruner, Digits]:
    """Both layers selected on a copy of the trained net whose weights rest."""
    model = copy.deepcopy(_trained())
    settings = {"sparsity_weight": 0.02, "polar_weight": 0.02, "rounds": 2, **settings}
    config = C2S2Config(
        include=("body.*",), tau_total=tau, begin=0.0, end=0.9, gate_lr=0.1, select_share=0.9, **settings
    )
    held_out = _rows(1000, 1400)
    pruner = _attached(model, config, {"pixel_values": held_out[0]["pixel_values"][:2]}, held_out)
    optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.0))
    batches = _rows(0, 1000, 50)
    pruner.step(0, 40)
    for step in range(1, 41):
        optimizer.zero_grad()
        pruner.batch_loss(model, batches[step % len(batches)]).backward()
        optimizer.step()
        pruner.step(step, 40)
    return pruner, model


def test_the_guard() -> None:
    held_out, dense = _rows(1000, 1400), _trained()
    before, kept = _loss(dense, held_out), []
    for tau in (0.0, 0.1, 1.0):
        pruner, model = _selection(tau)
        rise = _loss(model, held_out) - before
        assert rise <= (tau + 1e-5) * before
        kept.append([int(gate.keep().sum()) for gate in pruner.recipe.gates])
        assert not any(gate.keep()[12:].any() for gate in pruner.recipe.gates), "dead channels always go"
        assert sum(pruner.recipe.controller.rises) == pytest.approx(rise, abs=1e-4 * before)
        if tau == 0.0:
            assert all(gate.keep()[:12].sum() >= 10 for gate in pruner.recipe.gates)
        report = pruner.finalize()
        assert abs(_loss(model, held_out) - before - rise) < 1e-5
        assert report.run["loss_before"] == pytest.approx(before)
        assert sum(report.run["loss_rises"].values()) == pytest.approx(rise, abs=1e-4 * before)
    assert [sum(each) for each in kept] == sorted((sum(each) for each in kept), reverse=True)
    assert sum(kept[0]) > sum(kept[2])


def test_the_allowance_of_earlier_layers_carries_over() -> None:
    layers = _selection(0.1)[0].recipe.controller
    layers.rises, dense, (first, second) = [0.0, 0.0], layers.dense_loss, layers.shares
    assert first + second == pytest.approx(1.0)
    assert layers._allowance(0) == pytest.approx(0.1 * dense * first)
    assert layers._allowance(1) == pytest.approx(0.1 * dense)
    layers.rises = [0.03 * dense, 0.0]
    assert layers._allowance(1) == pytest.approx(0.07 * dense)
    layers.rises = [-0.5 * dense, 0.0]
    assert layers._allowance(1) == pytest.approx(0.1 * dense), "a fall of the loss buys nothing"


def test_goal_and_budget_together() -> None:
    pruner, _ = _selection(100.0, target_flops=0.55, sparsity_weight=0.3)
    graph = pruner.graph.traced
    share = graph.price(pruner.plan).multiply_adds / graph.price().multiply_adds
    assert share == pytest.approx(0.55, abs=0.04) and share <= 0.55, "one channel costs 3 %"
    assert pruner.at_goal
    pruner.finalize()
    with pytest.raises(PruneError, match=r"tau_total=0\.0 stopped the selection at 0\.\d+ .* target_flops=0\.2"):
        _selection(0.0, target_flops=0.2)


@pytest.mark.slow
def test_planted_channels_go_and_accuracy_holds_against_uniform_l1() -> None:
    test = _rows(1400, 1700)

    def accuracy(model: nn.Module) -> float:
        return float(torch.cat([answer(model, batch).argmax(1) == batch["labels"] for batch in test]).float().mean())

    model, inputs = copy.deepcopy(_trained()), {"pixel_values": test[0]["pixel_values"][:2]}
    config = C2S2Config(include=("body.*",), tau_total=2.0, gate_lr=0.05, rounds=3, sparsity_weight=0.1)
    pruner = _attached(model, config, inputs, _rows(1000, 1400))
    _train(model, 400, pruner)
    assert not any(gate.keep()[12:].any() for gate in pruner.recipe.gates)
    share = pruner.graph.traced.price(pruner.plan).multiply_adds / pruner.graph.traced.price().multiply_adds
    pruner.finalize()
    uniform = copy.deepcopy(_trained())
    prune(uniform, MagnitudeConfig(target_flops=share, scope="per_group", include=("body.*",)), inputs)
    _train(uniform, 400)
    assert share < 0.3 and accuracy(model) > accuracy(uniform) + 0.05, "L1 keeps the dead channels, which are large"


def test_segmentation() -> None:
    model, rows = tiny_segmentation_model(), segmentation_rows(8)
    data = [rows[:4], rows[4:]]
    config = C2S2Config(tau_total=0.3, rounds=1, gate_lr=0.3, sparsity_weight=0.05, end=0.9)
    pruner = _attached(model, config, {"pixel_values": data[0]["pixel_values"][:2]}, data)
    optimizer = pruner.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3))
    layers = len(pruner.recipe.gates)
    assert layers >= 2, [gate.name for gate in pruner.recipe.gates]
    steps = 8 * layers
    pruner.step(0, steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        pruner.batch_loss(model.train(), data[step % 2]).backward()
        optimizer.step()
        pruner.step(step, steps)
    model.eval()
    masked = answer(model, {"pixel_values": data[0]["pixel_values"]})
    report = pruner.finalize()
    assert report.sparsity > 0
    assert (answer(model, {"pixel_values": data[0]["pixel_values"]}) - masked).abs().max() < 1e-5


def test_an_unreachable_goal_leaves_the_model_alone() -> None:
    model = tiny_image_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(PruneError, match="cannot be reached"):
        _attached(model, C2S2Config(target_params=0.01))
    assert [type(module) for module in model.modules()] == kinds


def test_gates_keep_their_rate() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = SteadyAdam([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = 1e-9
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == pytest.approx(0.9, abs=1e-4) and optimizer.param_groups[0]["lr"] == 1e-9


def _walk(pruner: Pruner, steps: int) -> None:
    for step in range(steps + 1):
        pruner.step(step, steps)


def test_what_the_guard_needs() -> None:
    labelled = {**IMAGES, "labels": torch.tensor([0, 1])}
    with pytest.raises(PruneError, match="need more optimizer steps"):
        _walk(_attached(tiny_image_model(), C2S2Config(rounds=3), data=[labelled]), 4)
    with pytest.raises(PruneError, match="has no labels"):
        _walk(_attached(tiny_image_model(), C2S2Config(rounds=1), data=[IMAGES]), 20)
    with pytest.raises(PruneError, match="data="):
        Pruner(tiny_image_model(), C2S2Config(), IMAGES).attach()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"final_sparsity": 0.5}, "takes target_flops"),
        ({"target_flops": 1.0}, "removes nothing"),
        ({"tau_total": -0.1}, "tau_total must be"),
        ({"order": "size"}, "order must be one of"),
        ({"form": "binary"}, "form must be one of"),
        ({"rounds": 0}, "rounds must be"),
        ({"select_share": 1.0}, "select_share must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _attached(tiny_image_model(), C2S2Config(**settings))
