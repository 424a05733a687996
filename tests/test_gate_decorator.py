"""Acceptance of the Gate Decorator: exact conversion, Taylor score, group rule, what trains in Tick and Tock, a run."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import accuracy, digits, train
from gated_models import IMAGES, MODELS, answer, inputs_of, scramble
from segmentation import segmentation_rows, tiny_segmentation_model
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import hf_prune
from hf_prune import GateDecoratorConfig, MagnitudeConfig, PruneError, Pruner, PruneTrainer
from hf_prune.graph import trace
from hf_prune.methods.gate_decorator import NormGate, Timetable
from hf_prune.tiny_models import tiny_image_model

SHORT = {"tock_steps": 2, "tick_steps": 3, "ticks_per_tock": 2}


def _pruner(model: nn.Module | None = None, **settings: Any) -> Pruner:
    config = GateDecoratorConfig(**{"target_params": 0.7, **SHORT, **settings})
    pruner = Pruner(model if model is not None else tiny_image_model(), config, IMAGES)
    pruner.attach()
    return pruner


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:removed units emit")
def test_conversion_is_exact_in_both_modes_and_merging_too(name: str) -> None:
    """Also with scales that are negative or zero, and with offsets 50 times a scale."""
    make, residual, _ = MODELS[name]
    model, inputs = scramble(make()), inputs_of(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            with torch.no_grad():
                module.weight[:3] = torch.tensor([-0.8, 0.0, 0.01])
                module.bias[:3] = torch.tensor([0.3, 0.2, 0.5])
    twin = copy.deepcopy(model)
    pruner = Pruner(model, GateDecoratorConfig(target_params=0.9, residual=residual, min_keep=0.0, **SHORT), inputs)
    pruner.attach()
    scale = answer(twin, inputs).abs().max()
    assert (answer(model, inputs) - answer(twin, inputs)).abs().max() < 1e-6 * scale
    trained, plain = answer(copy.deepcopy(model).train(), inputs), answer(twin.train(), inputs)
    if "dropout" not in repr(model).lower():
        assert (trained - plain).abs().max() < 1e-6 * plain.abs().max()

    generator = torch.Generator().manual_seed(3)
    for gate in pruner.recipe.gates:
        gate.set_keep(torch.rand(len(gate.keep()), generator=generator) > 0.4)
        gate.function.keep[0] = True
        gate.set_keep(gate.function.keep.clone())
        for function in gate.functions:
            function.scale.data *= 0.5 + torch.rand(function.scale.shape, generator=generator)
    masked = answer(model, inputs)
    pruner.finalize()
    assert (answer(model, inputs) - masked).abs().max() < 1e-5 * scale


def test_the_gate_takes_over_the_scale_where_the_offset_is_not_too_large_for_it() -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-0.5, 0.0, 0.01, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.3, 0.5, 20.0]))
    gate = NormGate(4, torch.zeros(()), norm)
    assert torch.equal(gate.scale, torch.tensor([-0.5, 1.0, 1.0, 2.0])), "offsets: 0.2, none, 50 and 10 times the scale"
    assert torch.equal(gate.factor(), torch.ones(4))
    x = torch.randn(2, 4, 3, 3)
    (gate(norm(x), norm).sum()).backward()
    standard = nn.functional.batch_norm(x, None, None, training=True)
    paper = (standard + (norm.bias / norm.weight).view(4, 1, 1)).sum((0, 2, 3))
    assert torch.allclose(gate.scale.grad[[0, 3]], paper[[0, 3]], rtol=1e-4), "dL/dphi as with phi (x^ + beta / gamma)"


def _collected(losses: list[Any], scale: Tensor) -> Tensor:
    """Score of the first gate of a tiny model after one Tick step a loss; a loss takes the factor of the gate."""
    pruner = _pruner(tock_steps=0, tick_steps=10, residual=False)
    pruner.wrap(torch.optim.SGD(pruner.model.parameters(), lr=0.0))
    pruner.step(0, 100)
    function = pruner.recipe.gates[0].function
    function.scale.data[: len(scale)] = scale
    collect = pruner.recipe.transforms[function.scale]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss(function.scale[: len(scale)]), function.scale)
        assert torch.equal(collect(grad), grad), "the gradient stays as it is"
    return function.taylor[: len(scale)]


def test_taylor_score() -> None:
    a, phi = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, -2.0])
    once = _collected([lambda g: a @ g], phi)
    assert torch.allclose(once, (a * phi).abs())
    opposite = _collected([lambda g: a @ g, lambda g: -(a @ g)], phi)
    assert torch.allclose(opposite, 2 * (a * phi).abs()), "the absolute value is taken before the sum"
    assert torch.allclose(_collected([lambda g: 3.0 * g[0] ** 2], phi[:1]), torch.tensor([6.0 * 0.25]))


def test_scores_are_those_of_one_tick_and_start_anew() -> None:
    pruner = _pruner(**{**SHORT, "tock_steps": 1, "tick_steps": 2})
    optimizer = pruner.wrap(torch.optim.SGD(pruner.model.parameters(), lr=0.1))
    controller, function, totals = pruner.recipe.controller, pruner.recipe.gates[0].function, []
    pruner.step(0, 40)
    for step in range(1, 6):
        optimizer.zero_grad()
        pruner.batch_loss(pruner.model, {**IMAGES, "labels": torch.tensor([0, 2])}).backward()
        optimizer.step()
        totals.append(float(function.taylor.sum()))
        pruner.step(step, 40)
    assert totals[0] == 0.0, "none in Tock"
    assert 0.0 < totals[1] < totals[2] and 0.0 < totals[3] < totals[4]
    assert not any(each.taylor.any() for gate in pruner.recipe.gates for each in gate.functions)
    assert not all(gate.keep().all() for gate in pruner.recipe.gates)
    assert all((controller.scores()[gate.name][~gate.keep()] == -1).all() for gate in pruner.recipe.gates)


def test_group_rule() -> None:
    """Scores (3, 1) and (0, 5) of two layers make (3, 6): A goes in both, though the second layer likes B alone."""
    pruner = _pruner(min_keep=0.0)
    stream = max(pruner.recipe.gates, key=lambda gate: len(gate.functions))
    first, second = stream.functions[:2]
    for gate in pruner.recipe.gates:
        for function in gate.functions:
            function.taylor.fill_(100.0)
    for function in stream.functions:
        function.taylor[:2] = 0.0
    first.taylor[:2], second.taylor[:2] = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 5.0])
    controller = pruner.recipe.controller
    assert controller.scores()[stream.name][:2].tolist() == [3.0, 6.0]
    controller.config = GateDecoratorConfig(target_params=0.7, round_fraction=0.0, **SHORT)
    controller.prune(rounds_left=10_000)
    assert all(function.keep.tolist() == [False] + [True] * 7 for function in stream.functions)
    assert all(gate.keep().all() for gate in pruner.recipe.gates if gate is not stream)
    layers = [pruner.model.get_submodule(writer.host) for writer in stream.writers]
    assert len(layers) >= 2 and len({id(layer.gates) for layer in layers}) == len(layers)


def test_no_group_falls_below_its_floor_and_masks_only_shrink() -> None:
    pruner = _pruner(target_params=0.5, min_keep=0.25)
    before = {gate.name: gate.keep().clone() for gate in pruner.recipe.gates}
    lowest = pruner.recipe.gates[0]
    for rounds_left in (5, 4, 3, 2, 1):
        for gate in pruner.recipe.gates:
            for function in gate.functions:
                function.taylor.uniform_(0.0, 1e-3 if gate is lowest else 1.0)
        pruner.recipe.controller.prune(rounds_left)
        for gate in pruner.recipe.gates:
            assert not (gate.keep() & ~before[gate.name]).any()
            assert all(torch.equal(f.keep, gate.keep()) for f in gate.functions)
            before[gate.name] = gate.keep().clone()
    assert int(lowest.keep().sum()) == len(lowest.keep()) // 4
    traced = pruner.graph.traced
    assert 0.45 < traced.price(pruner.plan).parameters / traced.price().parameters <= 0.5


def test_timetable() -> None:
    table = Timetable(first=10, last=40, tick=3, tock=4, ticks=2)
    ends = [step for step in range(60) if table.rounds(step) > table.rounds(step - 1)]
    assert ends == [17, 20, 27, 30, 37, 40]
    ticks = [step for step in range(10, 30) if table.tock_share(step) is None]
    assert ticks == [14, 15, 16, 17, 18, 19, 24, 25, 26, 27, 28, 29]
    assert [table.tock_share(step) for step in (10, 13, 20)] == [0.125, 0.875, 0.125]


def test_what_trains_in_tick_and_in_tock() -> None:
    """With momentum and decay: convolutions rest bit for bit in Tick; in Tock the pull is lambda sign(phi)."""
    model = tiny_image_model()
    pruner = _pruner(model, sparsity_weight=0.25, gate_momentum=0.0, gate_weight_decay=0.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = pruner.wrap(sgd)
    batch = {**IMAGES, "labels": torch.tensor([0, 2])}
    pruner.step(0, 40)
    for step in range(1, 4):
        assert pruner.phase.name == ("tock" if step < 3 else "tick")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        pruner.batch_loss(model, batch).backward()
        if step == 1:
            gate = pruner.recipe.gates[0].function
            task = torch.autograd.grad(model(**batch).loss, gate.scale)[0]
            assert torch.allclose(gate.scale.grad, task + 0.25 * gate.scale.sign())
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        pruner.step(step, 40)
    gates = {name for name in before if name.endswith(".gates.scale")}
    offsets = {f"{name.removesuffix('.gates.scale')}.bias" for name in gates}
    assert moved == gates | offsets | {"classifier.1.weight", "classifier.1.bias"}
    scales = [writer.norm for each in pruner.recipe.gates for writer in each.writers]
    assert scales and not any(model.get_submodule(norm).weight.requires_grad for norm in scales)
    pruner.finalize()
    assert all(p.requires_grad for p in model.parameters())


def test_rates_of_the_phases() -> None:
    pruner = _pruner(tock_steps=4, tick_steps=3, end=0.5)
    controller = pruner.recipe.controller
    pruner.step(0, 80)
    assert [round(controller.phase(step).lr_scale, 4) for step in range(6)] == [0.325, 0.775, 0.775, 0.325, 0.1, 0.1]
    controller.reached = 40
    tune = [controller.phase(step) for step in (40, 59, 79)]
    assert [phase.name for phase in tune] == ["tune"] * 3 and not any(phase.penalties_active for phase in tune)
    assert tune[1].lr_scale > 0.95 and tune[0].lr_scale == pytest.approx(tune[2].lr_scale) and tune[0].lr_scale < 0.13


def test_a_run_without_a_whole_tick_is_refused_before_it_trains() -> None:
    with pytest.raises(PruneError, match="no Tick ends between"):
        _pruner(tock_steps=90).step(0, 100)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"final_sparsity": 0.5}, "needs one goal"),
        ({"target_flops": 1.0}, "removes nothing"),
        ({"target_flops": 0.5, "scope": "per_group"}, "scope must be one of"),
        ({"target_flops": 0.5, "tick_steps": 0}, "tick_steps must be"),
        ({"target_flops": 0.5, "lr_floor": 0.0}, "lr_floor must be"),
        ({"target_flops": 0.5, "round_fraction": 1.0}, "round_fraction must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GateDecoratorConfig(**settings)


class Noisy(nn.Module):
    """A CNN of which half the first filters see noise alone, and have the larger weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(2, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)
        with torch.no_grad():
            self.first.weight[:8, 1] = 0.0
            self.first.weight[8:, 0] = 0.0
            self.first.weight[8:] *= 8.0

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        hidden = self.norm1(self.first(pixel_values)).relu()
        logits = self.head(self.norm2(self.second(hidden)).relu().mean((2, 3)))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)


@pytest.mark.slow
def test_channels_that_see_noise_go_and_l1_with_the_same_steps_does_no_better() -> None:
    """Half of the multiply-adds, 300 steps of pruning and tuning for each."""
    torch.manual_seed(0)
    images, labels = digits()
    data, steps = (torch.cat([images, torch.randn_like(images)], 1), labels), 300
    example, dense = {"pixel_values": data[0][:2]}, Noisy()
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
    train(dense, sgd(dense.parameters()), data, steps=300)
    price = trace(dense.eval(), example).price().multiply_adds

    gated = copy.deepcopy(dense)
    config = GateDecoratorConfig(
        target_flops=0.5, include=("first", "second"), end=0.6, tock_steps=20, tick_steps=10, ticks_per_tock=4
    )
    pruner = Pruner(gated, config, example)
    pruner.attach()
    optimizer = pruner.wrap(sgd(gated.parameters()))
    pruner.step(0, steps)
    train(gated, optimizer, data, after_step=lambda step: pruner.step(step, steps), steps=steps)
    report = pruner.finalize()
    assert 0.4 < trace(gated.eval(), example).price().multiply_adds / price <= 0.5, "a channel is 6 % here"
    kept = {name: layer["kept"] / layer["units"] for name, layer in report.layers.items()}
    assert abs(kept["first"] - kept["second"]) > 0.05, "widths differ from layer to layer"
    noise = [index for index in report.layers["first"]["indices"] if index >= 8]
    assert len(noise) < len(report.layers["first"]["indices"]) / 4

    magnitude = copy.deepcopy(dense)
    hf_prune.prune(magnitude, MagnitudeConfig(target_flops=0.5, include=("first", "second")), example)
    train(magnitude, sgd(magnitude.parameters()), data, steps=steps)
    assert accuracy(gated, data) >= accuracy(magnitude, data)
    assert accuracy(gated, data) > 85.0


def test_segmentation_by_the_same_call(tmp_path: Path) -> None:
    trainer = PruneTrainer(
        model=tiny_segmentation_model(),
        args=TrainingArguments(
            str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=segmentation_rows(16),
        pruning=GateDecoratorConfig(target_params=0.8, tock_steps=1, tick_steps=1, ticks_per_tock=2),
    )  # fmt: skip
    dense = sum(parameter.numel() for parameter in tiny_segmentation_model().parameters())
    trainer.train()
    assert sum(parameter.numel() for parameter in trainer.model.parameters()) / dense == pytest.approx(0.8, abs=0.01)
    trainer.save_model(str(tmp_path / "out"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "out")
    example = {"pixel_values": torch.randn(2, 3, 64, 32)}
    assert torch.equal(answer(loaded, example), answer(trainer.model.eval(), example))
