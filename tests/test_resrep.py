"""Acceptance of the ResRep spec: identity and exact merge, gradient law, shrink time, release, what pruning costs."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from digits import accuracy, digits, train
from gated_models import IMAGES, MODELS, answer, inputs_of, scramble
from torch import nn
from transformers import TrainingArguments

import hf_prune
from hf_prune import MagnitudeConfig, PruneError, Pruner, PruneTrainer, ResRepConfig
from hf_prune.graph import trace
from hf_prune.methods.resrep import Compactor
from hf_prune.tiny_models import tiny_image_model

SMALL = ResRepConfig(target_params=0.8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", MODELS)
def test_identity_when_new_and_exact_when_merged(name: str, dtype: torch.dtype, tolerance: float) -> None:
    make, residual, compactors = MODELS[name]
    model, inputs = scramble(make()).to(dtype), inputs_of(name, dtype)
    config = ResRepConfig(target_params=0.9, residual=residual)
    plain, kinds = answer(model, inputs), [type(module) for module in model.modules()]
    pruner = Pruner(model, config, inputs)
    pruner.attach()
    assert (answer(model, inputs) - plain).abs().max() <= 1e-6
    assert len(pruner.recipe.gates) >= compactors

    generator = torch.Generator().manual_seed(3)
    for gate in pruner.recipe.gates:
        keep = torch.rand(len(gate.function.keep), generator=generator) > 0.4
        keep[0] = True
        gate.set_keep(keep)
        gate.function.closed.fill_(True)
        with torch.no_grad():
            gate.function.weight += 0.1 * torch.randn(gate.function.weight.shape, generator=generator).to(dtype)
    plan = {group: keep.clone() for group, keep in pruner.plan.items()}
    mixed = answer(model, inputs)
    scale = mixed.abs().max()
    assert (mixed - plain).abs().max() > 1e-3 * scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as constants that are lost
        report = pruner.finalize()
    assert (answer(model, inputs) - mixed).abs().max() <= tolerance * scale
    assert [type(module) for module in model.modules()] == kinds
    assert trace(model, inputs).price() == pruner.graph.traced.price(plan)
    assert {group: int(keep.sum()) for group, keep in plan.items()} == {
        group: layer["kept"] for group, layer in report.layers.items()
    }


def test_half_precision_models_keep_their_compactors_in_float() -> None:
    model = scramble(tiny_image_model()).to(torch.bfloat16)
    inputs = {"pixel_values": IMAGES["pixel_values"].bfloat16()}
    plain = answer(model, inputs)
    pruner = Pruner(model, SMALL, inputs)
    pruner.attach()
    compactor = pruner.recipe.gates[0].function
    assert compactor.weight.dtype == torch.float32 and torch.equal(answer(model, inputs), plain)
    model(**inputs).logits.sum().backward()
    assert compactor.weight.grad.any()
    pruner.finalize()
    assert (answer(model, inputs) - plain).abs().max() < 0.05 * plain.abs().max()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_targets_of_a_resnet_are_the_inner_layers_of_its_blocks() -> None:
    for residual, expected in ((False, 4), (True, 6)):
        pruner = Pruner(tiny_image_model(depths=[2, 2]), ResRepConfig(target_params=0.8, residual=residual), IMAGES)
        pruner.attach()
        names = [gate.name for gate in pruner.recipe.gates]
        assert len(names) == expected
        assert sum(name.endswith("layer.0.convolution") for name in names) == 4
        assert all(writer.norm for gate in pruner.recipe.gates for writer in gate.writers)
    stream = next(gate for gate in pruner.recipe.gates if len(gate.writers) > 1)
    shared = {pruner.model.get_submodule(writer.host).shared_function[0] for writer in stream.writers}
    assert shared == {stream.function} and len(list(stream.function.parameters())) == 1


def test_widths_that_would_leave_a_trace_are_no_targets() -> None:
    """sigmoid(0) = 0.5 reaches a padded convolution, which has no bias to take it."""

    def net(activation: nn.Module, padding: int) -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 6, 3, padding=padding)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

    def compactors(model: nn.Module) -> int:
        inputs = (IMAGES["pixel_values"],)
        model(*inputs)
        pruner = Pruner(model, ResRepConfig(target_params=0.9, include=("0",)), inputs)
        pruner.attach()
        return len(pruner.recipe.gates)

    assert compactors(net(nn.ReLU(), padding=1)) == 1
    assert compactors(net(nn.Sigmoid(), padding=0)) == 1
    with pytest.raises(PruneError, match="can carry a gate"):
        compactors(net(nn.Sigmoid(), padding=1))


def test_merged_norms_train_on_from_where_they_are() -> None:
    """Batches have the statistics that the merged norms expect, as far as channels do not correlate."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 17, 17)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=1.0), nn.ReLU(), nn.Conv2d(16, 4, 3))
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    model.train()(images)
    pruner = Pruner(model, ResRepConfig(target_params=0.5, include=("0",)), (images[:2],))
    pruner.attach()
    pruner.recipe.gates[0].set_keep(torch.arange(16) % 2 == 0)
    pruner.recipe.gates[0].function.closed.fill_(True)
    pruner.finalize()
    with torch.no_grad():
        evaluated, trained = model.eval()(images), model.train()(images)
    assert (evaluated - trained).abs().max() < 0.02 * evaluated.abs().max()


def test_gradient_law() -> None:
    compactor = Compactor(4, torch.zeros(()), lasso_weight=0.3)
    with torch.no_grad():
        compactor.weight.normal_()
        compactor.weight[3] = 0.0
    compactor.keep.copy_(torch.tensor([True, False, True, False]))
    grad, rows = torch.randn(4, 4), compactor.weight.detach()
    changed = compactor.reset_gradient(grad)
    pull = 0.3 * rows / rows.norm(dim=1, keepdim=True)
    assert torch.allclose(changed[1], pull[1], atol=1e-7)
    assert torch.allclose(changed[[0, 2]], grad[[0, 2]] + pull[[0, 2]], atol=1e-7)
    assert torch.equal(changed[3], torch.zeros(4)), "a row of zeros stays, and is finite"
    compactor.sparing.fill_(True)
    assert torch.equal(compactor.reset_gradient(grad)[[0, 2]], grad[[0, 2]]), "only forgotten rows are pulled"
    assert torch.equal(compactor.reset_gradient(grad)[[1, 3]], changed[[1, 3]])
    compactor.sparing.fill_(False)
    compactor.closed.fill_(True)
    assert torch.equal(compactor.reset_gradient(grad)[0], grad[0]), "no pull once the rows are cut"


@pytest.mark.parametrize("parts", [1, 4])
def test_accumulation_and_the_other_parameters(parts: int) -> None:
    """One step of a batch in any number of parts: G = m dL/dQ + lambda row / ||row||, everything else untouched."""
    model = tiny_image_model().eval()
    images, labels = torch.randn(8, 3, 17, 17), torch.arange(8) % 3
    plain = copy.deepcopy(model)
    plain(pixel_values=images, labels=labels).loss.backward()
    pruner = Pruner(model, ResRepConfig(target_params=0.8, lasso_weight=0.5, compactor_lr=0.1), IMAGES)
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.0))
    gate = pruner.recipe.gates[0]
    gate.function.keep[:4] = False
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (model(pixel_values=x, labels=y).loss / parts).backward()
    task = gate.function.weight.grad.clone()
    optimizer.step()
    task[:4] = 0.0
    wanted = torch.eye(8) - 0.1 * (task + 0.5 * torch.eye(8))
    assert torch.allclose(gate.function.weight, wanted, atol=1e-7)
    for name, parameter in plain.named_parameters():
        own = model.get_parameter(name).grad
        assert torch.allclose(own, parameter.grad, atol=1e-6) and (parts > 1 or torch.equal(own, parameter.grad))
    assert [group["momentum"] for group in optimizer.extras[0].param_groups] == [0.99]
    assert all(group.get("weight_decay", 0.0) == 0.0 for group in optimizer.extras[0].param_groups)


def _crossing(lasso: float, momentum: float, lr: float = 0.01) -> int:
    """Steps after which a row of norm 1, pulled by lasso alone, has crossed zero."""
    position, velocity, steps = 1.0, 0.0, 0
    while position > 0.0:
        velocity = momentum * velocity + lasso
        position -= lr * velocity
        steps += 1
    return steps


def test_shrink_time() -> None:
    assert _crossing(1e-4, 0.99) == pytest.approx(10_100, rel=0.01)
    assert _crossing(1e-4, 0.9) == pytest.approx(100_010, rel=0.01)
    assert _crossing(1e-2, 0.99) == pytest.approx(185, rel=0.01)


def test_a_forgotten_row_shrinks_at_that_rate() -> None:
    compactor = Compactor(2, torch.zeros((), dtype=torch.float64), lasso_weight=1e-2)
    compactor.keep[0] = False
    optimizer = torch.optim.SGD([compactor.weight], lr=0.01, momentum=0.99)
    direction = compactor.weight[0].detach().clone()
    steps = 0
    while compactor.weight[0] @ direction > 0:
        compactor.weight.grad = compactor.reset_gradient(torch.ones(2, 2).double())
        optimizer.step()
        steps += 1
    assert steps == _crossing(1e-2, 0.99)


def _attached(config: ResRepConfig) -> Pruner:
    pruner = Pruner(tiny_image_model(), config, IMAGES)
    pruner.attach()
    pruner.wrap(torch.optim.SGD(pruner.model.parameters(), lr=0.1))
    return pruner


def _move(pruner: Pruner, first: int, last: int, total: int) -> None:
    """As if the steps `first` to `last` of the run had been trained."""
    for step in range(first, last + 1):
        pruner.recipe.controller.count()
        pruner.step(step, total)


def _forgotten(pruner: Pruner) -> int:
    return sum(int((~gate.function.keep).sum()) for gate in pruner.recipe.gates)


def test_quota_grows_and_a_row_that_recovers_is_released() -> None:
    config = ResRepConfig(target_params=0.6, begin=0.1, mask_interval_steps=5, begin_granularity=2)
    pruner = _attached(config)
    pruner.step(0, 100)
    dropped = []
    for start in range(1, 66, 5):
        _move(pruner, start, start + 4, 100)
        dropped.append(_forgotten(pruner))
    assert dropped[:5] == [0, 0, 2, 4, 6], "none up to begin, then two more at each refresh"
    assert dropped[-2] == dropped[-1], "no more once the goal is met"
    compactor = next(gate.function for gate in pruner.recipe.gates if not gate.function.keep.all())
    row = int((~compactor.keep).nonzero()[0])
    with torch.no_grad():
        compactor.weight[row] *= 100
    _move(pruner, 66, 69, 100)
    assert not compactor.keep[row], "nothing moves between refreshes"
    _move(pruner, 70, 70, 100)
    assert compactor.keep[row]
    assert _forgotten(pruner) >= dropped[-1]


@pytest.mark.parametrize("pull", ["all", "forgotten"])
def test_rows_that_remember_are_spared_from_the_first_choice_on(pull: str) -> None:
    config = ResRepConfig(target_params=0.6, begin=0.1, mask_interval_steps=5, begin_granularity=2, pull=pull)
    pruner = _attached(config)

    def sparing() -> set[bool]:
        return {bool(gate.function.sparing) for gate in pruner.recipe.gates}

    pruner.step(0, 100)
    _move(pruner, 1, 14, 100)
    assert _forgotten(pruner) == 0 and sparing() == {False}, "all are pulled, and so ranked"
    _move(pruner, 15, 15, 100)
    assert _forgotten(pruner) == 2 and sparing() == {pull == "forgotten"}
    pruner.step(0, 100)
    assert sparing() == {False}, "a run that starts again ranks again"


def test_channels_at_their_floor_take_nothing_from_the_quota() -> None:
    config = ResRepConfig(target_params=0.7, begin=0.0, mask_interval_steps=1, begin_granularity=3, min_keep=0.5)
    pruner = _attached(config)
    first, second = (gate.function for gate in pruner.recipe.gates)
    with torch.no_grad():
        first.weight *= 0.01  # all of its rows rank below all of the other's
    for step in (1, 2, 3):
        _move(pruner, step, step, 100)
    assert int((~first.keep).sum()) == 4
    assert int((~second.keep).sum()) == 5


def test_the_cut_reaches_the_goal_exactly_and_says_what_is_lost() -> None:
    inputs = {"pixel_values": torch.randn(2, 3, 17, 17)}
    model = tiny_image_model(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2]).eval()
    dense = trace(model, inputs).price().multiply_adds
    pruner = Pruner(model, ResRepConfig(target_flops=0.6), inputs)
    pruner.attach()
    pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="not forgotten yet"):
        pruner.step(10, 10)
    assert pruner.at_goal and pruner.phase.name == "tune"
    cut = answer(model, inputs)
    pruner.finalize()
    assert 0.59 <= trace(model, inputs).price().multiply_adds / dense <= 0.6
    assert (answer(model, inputs) - cut).abs().max() < 1e-5


def test_forgotten_rows_are_cut_without_a_warning() -> None:
    pruner = _attached(ResRepConfig(target_params=0.7))
    with torch.no_grad():
        for gate in pruner.recipe.gates:
            gate.function.weight[2:] *= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step(10, 10)


def test_a_copy_taken_before_the_cut_has_all_channels_and_no_compactor() -> None:
    pruner = _attached(ResRepConfig(target_params=0.8))
    compactor, model = pruner.recipe.gates[0].function, scramble(pruner.model)
    with torch.no_grad():
        compactor.weight += 0.1 * torch.randn(8, 8)
    compactor.keep[:3] = False
    before = answer(model, IMAGES)
    copied, report = pruner.baked()
    assert torch.equal(answer(model, IMAGES), before)
    assert (answer(copied, IMAGES) - before).abs().max() < 1e-5
    assert copied.state_dict().keys() == tiny_image_model().state_dict().keys()
    assert report.layers[pruner.recipe.gates[0].name]["kept"] == 8 and pruner.sparsity == 0.0


def test_a_layer_in_exclude_keeps_what_it_writes_and_what_it_reads() -> None:
    last = "resnet.encoder.stages.1.layers.0.layer.1.convolution"
    config = ResRepConfig(target_params=0.95, residual=True, exclude=(last,))
    pruner = Pruner(tiny_image_model(), config, IMAGES)
    pruner.attach()
    names = [gate.name for gate in pruner.recipe.gates]
    assert names == ["resnet.stream", "resnet.encoder.stages.0.layers.0.layer.0.convolution"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"final_sparsity": 0.5}, "needs one goal"),
        ({"target_flops": 1.0}, "removes nothing"),
        ({"target_flops": 0.5, "scope": "per_group"}, "scope must be one of"),
        ({"target_flops": 0.5, "structure": "element"}, "structure must be one of"),
        ({"target_flops": 0.5, "lasso_weight": 0.0}, "lasso_weight must be"),
        ({"target_flops": 0.5, "mask_interval_steps": 0}, "mask_interval_steps must be"),
        ({"target_flops": 0.5, "compactor_momentum": 1.0}, "compactor_momentum must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ResRepConfig(**settings)


def test_an_unreachable_goal_leaves_the_model_alone() -> None:
    model = tiny_image_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(PruneError, match="cannot be reached"):
        Pruner(model, ResRepConfig(target_params=0.01), IMAGES).attach()
    assert [type(module) for module in model.modules()] == kinds


def _trainer(folder: Path, **settings: Any) -> PruneTrainer:
    images = torch.randn(32, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": images, "labels": torch.arange(32) % 3}).with_format("torch")
    arguments = TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    pruning = ResRepConfig(
        target_params=0.6, begin=0.1, end=0.8, mask_interval_steps=2, lasso_weight=0.05, residual=True
    )
    return PruneTrainer(model=tiny_image_model(), args=arguments, train_dataset=rows, pruning=pruning)


@pytest.mark.filterwarnings("ignore:.*not forgotten yet")
def test_a_run_in_prune_trainer_resumes_exactly_and_saves(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole")
    whole.train()
    _trainer(tmp_path / "broken", save_strategy="steps", save_steps=4).train()
    resumed = _trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    whole.save_model(str(tmp_path / "out"))
    loaded = type(whole.model).from_pretrained(tmp_path / "out")
    assert torch.equal(answer(loaded, IMAGES), answer(whole.model.eval(), IMAGES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not forgotten yet")
def test_pruning_itself_costs_nothing_where_lasso_without_resetting_loses() -> None:
    """Half of the multiply-adds of a digits classifier: the same pull at compactors, and at the kernels themselves."""
    data, lasso, steps = digits(), 1e-2, 400
    example = {"pixel_values": data[0][:2]}
    dense = tiny_image_model(num_channels=1, hidden_sizes=[16, 32], num_labels=10, downsample_in_first_stage=False)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
    train(dense, sgd(dense.parameters()), data, steps=300)
    price = trace(dense.eval(), example).price().multiply_adds

    model = copy.deepcopy(dense)
    config = ResRepConfig(target_flops=0.5, lasso_weight=lasso, mask_interval_steps=5, begin_granularity=1)
    pruner = Pruner(model, config, example)
    pruner.attach()
    before = []

    def move(step: int) -> None:
        if step == steps:
            before.append(accuracy(model, data))
        pruner.step(step, steps)

    move(0)
    train(model, pruner.wrap(sgd(model.parameters())), data, after_step=move)
    report = pruner.finalize()
    after = accuracy(model.eval(), data)
    assert trace(model, example).price().multiply_adds / price == pytest.approx(0.5, abs=0.01)
    assert after > 97.0
    assert abs(after - before[0]) < 0.1

    kernels = copy.deepcopy(dense)
    targets = [kernels.get_parameter(f"{name}.weight") for name in report.layers]

    def pull() -> None:
        for weight in targets:
            weight.grad += lasso * nn.functional.normalize(weight.detach().flatten(1), dim=1).view_as(weight)

    train(kernels, sgd(kernels.parameters()), data, before_step=pull)
    unpruned = accuracy(kernels.eval(), data)
    by_norm = MagnitudeConfig(target_flops=0.5, score="l2", include=tuple(report.layers))
    hf_prune.prune(kernels, by_norm, example)
    assert trace(kernels, example).price().multiply_adds / price == pytest.approx(0.5, abs=0.01)
    assert accuracy(kernels, data) < unpruned - 2.0
