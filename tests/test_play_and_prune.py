"""Acceptance of Play and Prune: controller law, selective pull, masks as good as cuts, tolerance, kill and resume."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from digits import TEST, VALIDATION, accuracy, digits, train
from gated_models import IMAGES, answer, scramble
from segmentation import segmentation_rows, tiny_segmentation_model
from torch import nn
from transformers import TrainingArguments

import hf_prune
from hf_prune import MagnitudeConfig, PlayAndPruneConfig, PruneError, Pruner, PruneTrainer
from hf_prune.graph import shrink, trace
from hf_prune.methods.play_and_prune import PlayAndPrune
from hf_prune.metrics import compute_metrics_for
from hf_prune.tiny_models import tiny_image_model
from hf_prune.types import Report


class Script:
    """Says one given metric after the other, and counts what the run was asked for."""

    def __init__(self, *values: float) -> None:
        self.values, self.snapshots, self.rollbacks = list(values), 0, 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return {"accuracy": self.values.pop(0)}

    def evaluate(self) -> dict[str, float]:
        return {"eval_accuracy": self.values.pop(0)}

    def snapshot(self) -> None:
        self.snapshots += 1

    def rollback(self) -> None:
        self.rollbacks += 1


def _pruner(script: Script, **settings: Any) -> tuple[Pruner, PlayAndPrune]:
    config = PlayAndPruneConfig(**{"max_metric_drop": 1.0, "iteration_steps": 1, **settings})
    pruner = Pruner(tiny_image_model(), config, IMAGES, evaluate=script)
    pruner.attach()
    return pruner, pruner.recipe.controller


def _review(game: PlayAndPrune, run: Script, step: int, total: int = 100) -> None:
    game.observe({"step": step, "total_steps": total, "progress": step / total})
    game.review(run)


def test_controller_law() -> None:
    """E = 90, eps = 1; A = 90, 89.5, 89, 88.5: slack 1, 0.5, 0, 0; pull and threshold follow, none is negative."""
    run = Script(90.0, 90.0, 89.5, 89.0, 88.5)
    _, game = _pruner(run, lasso_weight=0.1, threshold_quantile=0.5, acceleration=2.0)
    _review(game, run, 0)
    slacks, pulls = [], []
    for step in range(1, 5):
        _review(game, run, step)
        slacks.append(game.scaled(game.room(game.state.trajectory[-1][1])))
        pulls.append(game.config.lasso_weight * game.state.pressure)
        for gate in game.gates:
            norms = game.norms()[gate.name][gate.keep()]
            wanted = 2.0 * slacks[-1] * float(norms.quantile(0.5))
            assert game.state.thresholds[gate.name] == pytest.approx(wanted)
    assert slacks == [1.0, 0.5, 0.0, 0.0] and pulls == [0.1, 0.05, 0.0, 0.0]
    assert game.phase(4).name == "recover" and game.state.below == 1
    assert (run.snapshots, run.rollbacks) == (4, 0)


def test_recovery_then_return_at_half_the_pace() -> None:
    run = Script(90.0, 89.5, 88.0, 88.5, 88.9, 89.5)
    _, game = _pruner(run, patience=2)
    for step in range(5):
        _review(game, run, step)
        assert game.state.pressure == [1.0, 0.5, 0.0, 0.0, 0.25][step], "half of the slack of the state returned to"
    assert (run.snapshots, run.rollbacks) == (2, 1) and game.phase(5).name == "prune"
    units = game.state.trajectory[1][2]
    assert game.state.trajectory[-1] == [4, 89.5, units]
    _review(game, run, 5)
    assert run.snapshots == 3


def test_a_run_that_ends_below_the_tolerance_returns() -> None:
    run = Script(0.9, 0.2)
    _, game = _pruner(run, max_metric_drop=0.1, iteration_steps=60)
    for step in range(101):
        if step in (0, 100):
            _review(game, run, step)
    assert run.rollbacks == 1 and game.state.trajectory[-1][:2] == [100, 0.9]


def test_lower_is_better_for_a_loss() -> None:
    run = Script()
    _, game = _pruner(run, higher_is_better=False, max_metric_drop=0.5)
    game.state.reference = 1.0
    assert [game.room(value) for value in (0.5, 1.0, 1.5, 2.0)] == [1.0, 0.5, 0.0, -0.5]


def test_the_unimportant_are_the_lowest_tenth_of_each_layer_and_they_alone_are_pulled() -> None:
    """One step of plain SGD without a task gradient: U moves by -lr lambda sign(w), all else stays bit for bit."""
    model = tiny_image_model(hidden_sizes=[8, 32])
    config = PlayAndPruneConfig(max_metric_drop=1.0, unimportant=0.25, lasso_weight=0.2, residual=False)
    pruner = Pruner(model, config, IMAGES, evaluate=Script(1.0))
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    pruner.step(0, 100)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    expected = dict(before)
    for gate in pruner.recipe.gates:
        (weight,) = (p for p, name in names.items() if name.startswith(f"{gate.name}.") and p.ndim == 4)
        lowest = before[weight].abs().sum((1, 2, 3)).argsort()[: len(weight) // 4]
        chosen = pruner.recipe.controller.state.unimportant[gate.name]
        assert set(chosen.nonzero()[:, 0].tolist()) == set(lowest.tolist())
        pull = torch.zeros_like(weight)
        pull[lowest] = 0.2 * before[weight][lowest].sign()
        expected[weight] = torch.add(before[weight], pull, alpha=-0.1)
    assert all(torch.equal(parameter, expected[parameter]) for parameter in model.parameters())
    assert sum(not torch.equal(before[p], expected[p]) for p in before) == len(pruner.recipe.gates) >= 2


def test_removing_filters_is_capped_by_share_threshold_and_floor() -> None:
    run = Script(*[1.0] * 20)
    _, game = _pruner(run, unimportant=0.3, threshold_quantile=1.0, acceleration=10.0, min_keep=0.5)
    sizes = []
    for step in range(8):
        _review(game, run, step)
        sizes.append([int(gate.keep().sum()) for gate in game.gates])
    assert sizes[:4] == [[8, 16], [6, 12], [5, 9], [4, 8]], "three tenths of what is left each time, half stays"
    assert game.state.finished is False and sizes[-1] == [4, 8]
    _review(game, run, 9)
    assert game.state.finished and game.phase(9).name == "tune", "five iterations without a filter to go"


def test_masks_and_cuts_agree_in_outputs_and_in_the_next_step() -> None:
    """A removed filter is as good as cut: same answers, same momentum of what stays, same step."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten()]
    narrow = scramble(nn.Sequential(*layers, nn.Linear(4 * 25, 3)))
    images, labels = torch.randn(16, 3, 5, 5), torch.arange(16) % 3
    masked, graph = copy.deepcopy(narrow), trace(narrow, (images[:2],))
    config = PlayAndPruneConfig(max_metric_drop=1.0, include=("0",), lasso_weight=0.0, end=0.5)
    pruner = Pruner(masked, config, (images[:2],), evaluate=Script(1.0, 1.0, 1.0))
    pruner.attach()
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizers = pruner.wrap(sgd(masked.parameters())), sgd(narrow.parameters())
    keep = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool()

    def step() -> None:
        for model, optimizer in zip((masked, narrow), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()

    step()
    own = {name.replace("parametrizations.", "").replace(".original", ""): p for name, p in masked.named_parameters()}
    moments = {name: optimizers[0].state[p]["momentum_buffer"].clone() for name, p in own.items()}
    pruner.recipe.gates[0].set_keep(keep)
    (name,) = graph.groups.keys() & {"0"}
    shrink(narrow, graph, {name: keep})
    for place, parameter in narrow.named_parameters():
        buffer = _narrow(optimizers[1].state[parameter]["momentum_buffer"], parameter, keep)
        optimizers[1].state[parameter]["momentum_buffer"] = buffer
        assert torch.allclose(buffer, _narrow(moments[place], buffer, keep), atol=1e-6)
    with torch.no_grad():
        assert (masked.eval()(images) - narrow.eval()(images)).abs().max() < 1e-5
    step()
    pruner.finalize()
    for place, parameter in narrow.named_parameters():
        assert torch.allclose(parameter, masked.get_parameter(place), atol=1e-6), place


def _narrow(whole: torch.Tensor, like: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """`whole` where `keep`, along each dimension in which `like` is smaller."""
    for dim, size in enumerate(like.shape):
        if size != whole.shape[dim]:
            whole = whole.index_select(dim, keep.nonzero()[:, 0])
    return whole


DATA, EXAMPLE, STEPS = digits(), {"pixel_values": digits()[0][:2]}, 160
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)


@cache
def _dense() -> nn.Module:
    torch.manual_seed(0)
    model = tiny_image_model(num_channels=1, hidden_sizes=[16, 32], num_labels=10, downsample_in_first_stage=False)
    train(model, SGD(model.parameters()), DATA, steps=120)
    return model


@cache
def _played(points: float) -> tuple[nn.Module, Report]:
    """A digits classifier after a run with a tolerance of `points` on the validation rows."""
    model = copy.deepcopy(_dense())
    config = PlayAndPruneConfig(
        max_metric_drop=points, iteration_steps=10, lasso_weight=5e-3, threshold_quantile=0.1, patience=2
    )
    pruner = Pruner(model, config, EXAMPLE, evaluate=lambda net: {"accuracy": accuracy(net, DATA, VALIDATION)})
    pruner.attach()
    optimizer = pruner.wrap(SGD(model.parameters()))
    pruner.step(0, STEPS)
    train(model, optimizer, DATA, after_step=lambda step: pruner.step(step, STEPS), steps=STEPS)
    return model.eval(), pruner.finalize()


@pytest.mark.parametrize("points", [pytest.param(0.0, marks=pytest.mark.slow), 2.0])
def test_the_tolerance_holds_and_filters_go(points: float) -> None:
    model, report = _played(points)
    reached, reference = accuracy(model, DATA, VALIDATION), report.run["reference"]
    assert reference == accuracy(_dense(), DATA, VALIDATION)
    assert reached >= reference - points - 1e-6
    assert reached == pytest.approx(report.run["trajectory"][-1][1], abs=1e-4)
    assert (
        all(layer["kept"] <= layer["units"] for layer in report.layers.values()) and report.run["tolerance"] == points
    )
    if points:
        assert sum(layer["kept"] for layer in report.layers.values()) < sum(
            each["units"] for each in report.layers.values()
        )


@pytest.mark.slow
def test_a_larger_tolerance_removes_at_least_as_much() -> None:
    removed = [_played(points)[1].sparsity for points in (0.0, 2.0)]
    assert removed[0] <= removed[1]


@pytest.mark.slow
def test_l1_at_once_to_the_same_price_is_not_better() -> None:
    model, report = _played(2.0)
    price = trace(copy.deepcopy(_dense()).eval(), EXAMPLE).price().multiply_adds
    share, plain = trace(model, EXAMPLE).price().multiply_adds / price, copy.deepcopy(_dense()).eval()
    hf_prune.prune(plain, MagnitudeConfig(target_flops=share, include=tuple(report.layers)), EXAMPLE)
    train(plain, SGD(plain.parameters()), DATA, steps=STEPS)
    assert accuracy(plain, DATA, TEST) <= accuracy(model, DATA, TEST) + 1.0, "two standard errors"


def test_snapshot_and_rollback_bring_model_masks_and_moments_back() -> None:
    pruner, _ = _pruner(Script(1.0))
    model = pruner.model.train()
    optimizer = pruner.wrap(torch.optim.Adam(model.parameters(), lr=0.01))

    def step(seed: int) -> None:
        images = torch.randn(4, 3, 17, 17, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(pixel_values=images, labels=torch.arange(4) % 3).loss.backward()
        optimizer.step()

    with pytest.raises(PruneError, match="no snapshot"):
        pruner.rollback()
    step(0)
    pruner.snapshot()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(1)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    pruner.recipe.gates[0].set_keep(torch.arange(8) < 2)
    step(2)
    for group in optimizer.param_groups:
        group["lr"] = 0.005
    pruner.rollback()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}, "the schedule goes on"
    optimizer.param_groups[0]["lr"] = 0.01
    step(1)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    pruner.shrink_now({pruner.recipe.gates[0].name: torch.arange(8) < 4})
    with pytest.raises(PruneError, match="no snapshot"):
        pruner.rollback()


def test_evaluating_leaves_modes_and_random_numbers_alone() -> None:
    def look(model: nn.Module) -> dict[str, float]:
        assert not model.training
        return {"accuracy": float(torch.rand(()))}

    pruner, _ = _pruner(look)
    pruner.model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    pruner.evaluate()
    assert torch.equal(torch.rand(2), expected) and pruner.model.training


def _trainer(folder: Path, evaluated: bool = True, **settings: Any) -> PruneTrainer:
    images = torch.randn(48, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": images, "labels": torch.arange(48) % 3}).with_format("torch")
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    pruning = PlayAndPruneConfig(max_metric_drop=0.06, iteration_steps=1, patience=0, threshold_quantile=0.3)
    return PruneTrainer(
        model=tiny_image_model(), args=arguments, train_dataset=rows.select(range(32)), pruning=pruning,
        eval_dataset=rows.select(range(32, 48)) if evaluated else None, compute_metrics=compute_metrics_for("accuracy"),
    )  # fmt: skip


def test_a_run_in_prune_trainer_resumes_exactly_with_its_snapshot(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole")
    whole.train()
    trajectory = whole.report.run["trajectory"]
    assert len(trajectory) > 9, "a return to an older state is among them"
    _trainer(tmp_path / "broken", save_strategy="steps", save_steps=4).train()
    resumed = _trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert resumed.report.run["trajectory"] == trajectory
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.evaluate()["eval_accuracy"] >= whole.report.run["reference"] - 0.06 - 1e-9
    assert whole.report.run["reference"] == trajectory[0][1]


def test_the_validation_rows_alone_are_looked_at(tmp_path: Path) -> None:
    trainer, seen = _trainer(tmp_path), []
    loop = trainer.evaluation_loop

    def watched(loader: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(loader.dataset)
        return loop(loader, *args, **kwargs)

    trainer.evaluation_loop = watched
    trainer.train()
    assert len(seen) == 9 and all(
        [int(label) for label in rows["labels"]] == [i % 3 for i in range(32, 48)] for rows in seen
    )
    assert not any("eval_accuracy" in entry for entry in trainer.state.log_history), "looking is not logged"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match="give PruneTrainer one eval_dataset"):
        _trainer(tmp_path, evaluated=False)
    with pytest.raises(ValueError, match="needs max_metric_drop"):
        PlayAndPruneConfig()
    with pytest.raises(ValueError, match="a run has one goal"):
        PlayAndPruneConfig(max_metric_drop=1.0, target_flops=0.5)
    pruner, _ = _pruner(lambda model: {"eval_loss": 1.0})
    with pytest.raises(PruneError, match="no metric 'accuracy', only eval_loss"):
        pruner.step(0, 10)
    pruner, _ = _pruner(lambda model: {"accuracy": float("nan")})
    with pytest.raises(PruneError, match="no tolerance can be kept"):
        pruner.step(0, 10)


def test_segmentation_by_the_same_call(tmp_path: Path) -> None:
    trainer = PruneTrainer(
        model=tiny_segmentation_model(),
        args=TrainingArguments(
            str(tmp_path / "run"), max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=segmentation_rows(16),
        eval_dataset=segmentation_rows(4),
        pruning=PlayAndPruneConfig(max_metric_drop=0.1, metric="loss", higher_is_better=False, iteration_steps=1),
    )  # fmt: skip
    trainer.train()
    run = trainer.report.run
    assert 0.0 < trainer.report.sparsity < 1.0 and trainer.evaluate()["eval_loss"] <= run["reference"] + 0.1
    trainer.save_model(str(tmp_path / "out"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "out")
    example = {"pixel_values": torch.randn(2, 3, 64, 32)}
    assert torch.equal(answer(loaded, example), answer(trainer.model.eval(), example))
