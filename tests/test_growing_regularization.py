"""Acceptance of the GReg spec: closed forms on quadratics, the penalties' course, resume, what clipping leaves be."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_prune import GrowingRegularizationConfig, MagnitudeConfig, PruneError, Pruner, PruneTrainer
from hf_prune.graph import trace
from hf_prune.tiny_models import tiny_image_model

IMAGES = {"pixel_values": torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0))}


class Quadratics(nn.Module):
    """Independent quadratics 0.5 (w - w*)' H (w - w*), the weights of each one layer, at their minima when new."""

    def __init__(self, minima: Tensor, hessians: Tensor) -> None:
        """minima: (problems, n).  hessians: (problems, n, n), or (problems, n) where diagonal."""
        super().__init__()
        problems, n = minima.shape
        self.layers = nn.ModuleList(nn.Linear(n, 1, bias=False, dtype=torch.float64) for _ in range(problems))
        self.minima = minima.double()
        self.hessians = hessians.double() if hessians.ndim == 3 else torch.diag_embed(hessians.double())
        with torch.no_grad():
            for layer, minimum in zip(self.layers, self.minima, strict=True):
                layer.weight.copy_(minimum[None])

    def weights(self) -> Tensor:
        return torch.cat([layer.weight for layer in self.layers])

    def losses(self) -> Tensor:
        """(problems,)"""
        away = self.weights() - self.minima
        return 0.5 * torch.einsum("pi,pij,pj->p", away, self.hessians, away)


class Newton(torch.optim.Optimizer):
    """Divides the gradient by curvature plus `ceiling`: one step to the minimum under that penalty."""

    def __init__(self, parameters: Iterable[nn.Parameter], hessians: Tensor, ceiling: float) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.steps = [1.0 / (torch.diagonal(each) + ceiling) for each in hessians]

    def step(self, closure: Any = None) -> None:
        for parameter, step in zip(self.param_groups[0]["params"], self.steps, strict=True):
            parameter.data -= step * parameter.grad


def _run(
    model: Quadratics,
    config: GrowingRegularizationConfig,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
    watch: Callable[[Pruner], None] = lambda pruner: None,
) -> Pruner:
    pruner = Pruner(model, config)
    pruner.attach()
    wrapped = pruner.wrap(optimizer(list(model.parameters())))
    pruner.step(0, steps)
    for step in range(1, steps + 1):
        wrapped.zero_grad()
        model.losses().sum().backward()
        wrapped.step()
        pruner.step(step, steps)
        watch(pruner)
    return pruner


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_under_a_penalty_on_all_reach_the_closed_form(optimizer: str) -> None:
    """w = h / (h + lambda) w*: lambda 0.5 shrinks the larger weight, in the flat direction, below the other."""
    model = Quadratics(torch.tensor([[1.0, 0.8]]), torch.tensor([[0.05, 2.0]]))
    config = GrowingRegularizationConfig(
        final_sparsity=0.5, variant=2, pick_step=0.25, pick_max=0.75, interval_steps=700, penalty_step=0.5, end=0.99
    )
    before_the_pick: list[Tensor] = []

    def watch(pruner: Pruner) -> None:
        if pruner.phase.name == "pick":
            before_the_pick.append(model.weights().detach()[0].clone())

    # Updates before steps 0, 700 and 1,400: lambda is 0.5 up to step 1,400, 0.75 up to step 2,100, where it picks.
    pruner = _run(model, config, OPTIMIZERS[optimizer], 2400, watch)
    expected = torch.tensor([0.05 / 0.55, 2.0 / 2.5 * 0.8], dtype=torch.float64)
    assert expected.tolist() == pytest.approx([0.0909, 0.64], abs=1e-4)
    assert (before_the_pick[1399] - expected).abs().max() < 1e-6
    assert len(before_the_pick) == 2099
    assert pruner.plan["layers.0.weight"].tolist() == [False, True]
    costs = [0.5 * h * w**2 for h, w in ((0.05, 1.0), (2.0, 0.8))]
    assert costs == pytest.approx([0.025, 0.64]), "it removed the one whose removal costs less"


def test_size_alone_removes_the_other_weight() -> None:
    model = Quadratics(torch.tensor([[1.0, 0.8]]), torch.tensor([[0.05, 2.0]]))
    config = GrowingRegularizationConfig(final_sparsity=0.5, end=0.9)
    assert _run(model, config, OPTIMIZERS["sgd"], 10).plan["layers.0.weight"].tolist() == [True, False]


def _half_dropped(minima: Tensor, curvatures: Tensor, ceiling: float) -> float:
    """Mean loss of the weights that GReg-2 drops, which picks at `ceiling`."""
    model = Quadratics(minima, curvatures)
    config = GrowingRegularizationConfig(
        final_sparsity=0.5, variant=2, pick_step=ceiling / 5, pick_max=ceiling, interval_steps=1, end=0.9
    )
    pruner = _run(model, config, lambda parameters: Newton(parameters, model.hessians, ceiling), 20)
    dropped = ~torch.stack([pruner.plan[f"layers.{i}.weight"] for i in range(len(minima))])
    return _cost(minima, curvatures, dropped)


def _cost(minima: Tensor, curvatures: Tensor, dropped: Tensor) -> float:
    return float((0.5 * curvatures * minima.square() * dropped).sum(1).mean())


def test_the_pick_separates_by_curvature() -> None:
    """200 weights, w* ~ N(0, 1), log h ~ N(0, 1.5), half dropped, 20 seeds."""
    generator = torch.Generator().manual_seed(0)
    minima = torch.randn(20, 200, generator=generator)
    curvatures = torch.exp(1.5 * torch.randn(20, 200, generator=generator))
    by_size = minima.abs() < minima.abs().median(dim=1, keepdim=True).values
    costs = curvatures * minima.square()
    oracle = _cost(minima, curvatures, costs <= costs.median(dim=1, keepdim=True).values)
    chosen = [_half_dropped(minima, curvatures, ceiling) for ceiling in (0.01, 0.1, 0.5, 1.0)]
    assert _cost(minima, curvatures, by_size) > chosen[0] > chosen[1] > chosen[2]
    assert chosen[3] < 1.2 * oracle
    assert chosen[3] < 0.4 * _cost(minima, curvatures, by_size)


def _rotated(seed: int) -> tuple[Tensor, Tensor]:
    """A minimum (20,) and a Hessian with eigenvalues from 0.01 to 1 along random axes."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    return torch.randn(20, generator=generator, dtype=torch.float64), (
        axes * torch.logspace(-2, 0, 20, dtype=torch.float64) @ axes.T
    )


def test_growing_beats_removing_the_same_weights_at_once() -> None:
    """The loss right after the cut is that of the best model with those weights at zero."""
    minima, hessians = map(torch.stack, zip(*(_rotated(seed) for seed in range(20)), strict=True))
    model = Quadratics(minima, hessians)
    config = GrowingRegularizationConfig(final_sparsity=0.5, interval_steps=1, penalty_max=4.0, end=1.0)
    pruner = _run(model, config, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), 500)
    grown = model.losses().detach()
    keep = torch.stack([pruner.plan[f"layers.{i}.weight"] for i in range(20)])
    assert torch.equal(keep, minima.abs() > minima.abs().median(dim=1, keepdim=True).values)
    away = torch.where(keep, 0.0, -minima)
    at_once = 0.5 * torch.einsum("pi,pij,pj->p", away, hessians, away)
    best = torch.stack([_best_loss(*each) for each in zip(minima, hessians, keep, strict=True)])
    assert bool((grown < at_once).all())
    assert float(at_once.mean()) > 1.5 * float(best.mean())
    assert float(grown.mean()) < 1.1 * float(best.mean())


def _best_loss(minimum: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """Of weights with that support: the kept ones solve H_kk (w - w*)_k = H_kd w*_d."""
    away = -minimum.masked_fill(keep, 0.0)
    away[keep] = torch.linalg.solve(hessian[keep][:, keep], hessian[keep][:, ~keep] @ minimum[~keep])
    return 0.5 * away @ hessian @ away


def _images(config: GrowingRegularizationConfig, steps: int = 20) -> tuple[Pruner, Callable[[int], None]]:
    """A pruner on a tiny image model, and a function that trains it up to a step."""
    model = tiny_image_model().train()
    pruner = Pruner(model, config, IMAGES)
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    pruner.step(0, steps)
    done = [0]

    def advance(to: int) -> None:
        while done[0] < to:
            optimizer.zero_grad()
            pruner.batch_loss(model, {**IMAGES, "labels": torch.tensor([0, 1])}).backward()
            optimizer.step()
            done[0] += 1
            pruner.step(done[0], steps)

    return pruner, advance


def test_the_course_of_the_penalties() -> None:
    config = GrowingRegularizationConfig(
        target_units=0.5, variant=2, interval_steps=2, pick_step=1e-5, pick_max=4e-5, penalty_step=1e-4, end=0.8
    )
    pruner, advance = _images(config)
    controller, penalties = pruner.recipe.controller, []
    for step in range(1, 16):
        advance(step)
        penalties.append({each.penalty for each in controller.pushed.values()}.pop())
        assert bool(controller.keep) == (step >= 8), "the pick is at the fifth update, when 4e-5 is reached"
    # Updates at steps 0 (before the first one), 2, 4, ...
    course = [1e-5, *[2e-5] * 2, *[3e-5] * 2, *[4e-5] * 2]
    course += [4e-5 + (1 + i // 2) * 1e-4 for i in range(8)]
    assert penalties == pytest.approx(course, rel=1e-6)
    assert pruner.sparsity == 0.0, "nothing is cut before `end`"
    with pytest.warns(UserWarning, match="have not reached their ceiling"):
        advance(16)
    assert pruner.phase.name == "tune" and pruner.sparsity > 0.3


def test_what_a_step_adds_to_the_gradient() -> None:
    """Pushed filters and their norms' scales get lambda times themselves, kept ones the recovery, others nothing."""
    config = GrowingRegularizationConfig(target_units=0.5, variant=2, pick_step=1.0, pick_max=1.0, interval_steps=1)
    pruner, advance = _images(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        advance(3)
    controller = pruner.recipe.controller
    name = "resnet.encoder.stages.1.layers.0.layer.0.convolution"
    keep, penalty = controller.keep[name], controller.pushed[name].penalty
    assert int(keep.sum()) == len(keep) // 2 and penalty > 0.9
    layer = pruner.model.get_submodule(name.removesuffix(".convolution"))
    for parameter in (
        layer.convolution.parametrizations.weight.original,
        layer.normalization.parametrizations.weight.original,
    ):
        before = torch.zeros_like(parameter)
        after = pruner.recipe.transforms[parameter](before)
        shape = [-1] + [1] * (parameter.ndim - 1)
        own = torch.where(keep, -1e-4, penalty).view(shape)
        assert torch.allclose(after, own * parameter, rtol=1e-5)
    classifier = pruner.model.classifier[1]
    assert not any(parameter in pruner.recipe.transforms for parameter in classifier.parameters())


def test_a_structure_stops_rising_at_its_ratio() -> None:
    config = GrowingRegularizationConfig(target_units=0.5, interval_steps=1, penalty_step=1e-3, ratio_max=1.5, end=0.9)
    pruner, _ = _images(config)
    controller = pruner.recipe.controller
    pushed, name = controller.pushed, "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    sizes, keep = controller.sizes()[name], controller.keep[name]
    first = float(sizes[keep].mean() / sizes[~keep].mean())
    assert pushed[name].ratio == pytest.approx(0.9 + 0.1 * first, rel=1e-5)
    pruner.model.get_submodule(name).parametrizations.weight.original.data[~keep] *= 1e-4
    for step in range(1, 6):
        controller.observe({"progress": step / 20})
    assert pushed[name].done and pushed[name].penalty == pytest.approx(2e-3)
    assert max(each.penalty for each in pushed.values()) == pytest.approx(6e-3), "the others go on"


def test_lengths_that_are_left_open_are_those_of_the_authors_run() -> None:
    pruner, advance = _images(GrowingRegularizationConfig(target_units=0.5, interval_steps=1, end=1.0), steps=40)
    pushed = pruner.recipe.controller.pushed
    advance(10)
    assert {round(each.penalty, 9) for each in pushed.values()} == {0.5}
    advance(20)
    assert {each.penalty for each in pushed.values()} == {1.0}, "at the ceiling half-way, and held from there"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(40)


def test_the_same_units_as_a_cut_at_once() -> None:
    pruner, advance = _images(GrowingRegularizationConfig(target_units=0.5, end=0.1))
    at_once = Pruner(tiny_image_model(), MagnitudeConfig(target_units=0.5, scope="per_group"), IMAGES)
    at_once.attach()
    at_once.step(1, 1)
    with pytest.warns(UserWarning, match="have not reached their ceiling"):
        advance(2)
    for name, keep in at_once.plan.items():
        assert torch.equal(keep, pruner.plan[name]), name


def test_clipping_does_not_reach_the_penalty(tmp_path: Path) -> None:
    """Trainer clips the task's gradient to nothing; pushed units shrink all the same."""
    trainer = _trainer(tmp_path, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=1e-9)
    dense = copy.deepcopy(trainer.model.state_dict())
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    sizes: list[Tensor] = []
    step = trainer.pruner.step

    def measured(at: int, total: int) -> None:
        step(at, total)
        if at == 5:
            sizes.append(trainer.pruner.recipe.controller.keep[name].clone())
            sizes.append(dense_weight(trainer.model, name))

    trainer.pruner.step = measured
    trainer.train()
    keep, weight = sizes
    start = dense[f"{name}.parametrizations.weight.original"]
    # Four updates with growing lambda at rate 0.1: w (1 - 0.1 lambda_1) (1 - 0.1 lambda_2) ...
    penalties = [1.0 * min(i / 10 / (0.6 * 0.5), 1.0) for i in range(5)]
    factor = math.prod(1 - 0.1 * each for each in penalties)
    assert torch.allclose(weight[~keep], factor * start[~keep], rtol=1e-4, atol=1e-8)
    assert torch.allclose(weight[keep], start[keep], atol=1e-8)


def dense_weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).parametrizations.weight.original.detach().clone()


def _trainer(folder: Path, *, variant: int = 1, **settings: Any) -> PruneTrainer:
    images = torch.randn(32, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": images, "labels": torch.arange(32) % 3}).with_format("torch")
    arguments = TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    pruning = GrowingRegularizationConfig(target_units=0.5, variant=variant, interval_steps=1)
    return PruneTrainer(model=tiny_image_model(), args=arguments, train_dataset=rows, pruning=pruning)


@pytest.mark.parametrize("variant", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_stopped_while_it_pushes_resumes_exactly(tmp_path: Path, variant: int) -> None:
    whole = _trainer(tmp_path / "whole", variant=variant)
    whole.train()
    _trainer(tmp_path / "broken", variant=variant, save_strategy="steps", save_steps=2).train()
    state = torch.load(tmp_path / "broken" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    controller = state["hf_prune"]["saved"]["pruner"]["controller"]
    assert controller["keep"] and 0 < min(each["penalty"] for each in controller["pushed"].values()) < 1
    resumed = _trainer(tmp_path / "broken", variant=variant)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_finished_model_is_narrow(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    before = trace(tiny_image_model(), IMAGES).price().multiply_adds
    trainer.train()
    assert trace(trainer.model.eval(), IMAGES).price().multiply_adds < 0.45 * before
    assert all(layer["kept"] == layer["units"] // 2 for layer in trainer.report.layers.values())


def test_sixteen_bit_weights_are_refused() -> None:
    model = tiny_image_model().to(torch.bfloat16)
    images = {"pixel_values": IMAGES["pixel_values"].to(torch.bfloat16)}
    with pytest.raises(PruneError, match=r"bfloat16.*Keep the model in float32"):
        Pruner(model, GrowingRegularizationConfig(target_units=0.5), images).attach()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"target_units": 1.0}, "removes nothing"),
        ({"target_units": 0.5, "structure": "element"}, "does not go with"),
        ({"target_units": 0.5, "variant": 3}, "variant must be 1"),
        ({"target_units": 0.5, "interval_steps": 0}, "interval_steps must be"),
        ({"target_units": 0.5, "penalty_step": 0.0}, "penalty_step must be"),
        ({"target_units": 0.5, "recover": 1e-4}, "recover must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GrowingRegularizationConfig(**settings)
