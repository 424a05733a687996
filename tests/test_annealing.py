"""Acceptance of annealing: the table of counts, support recovery, parity, irreversible cuts, a model that shrinks."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import noisy_digits as digits
import pytest
import torch
from datasets import Dataset
from fitting import accuracy
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_prune import AnnealingConfig, Pruner, PruneTrainer
from hf_prune.config import Goal
from hf_prune.parts import schedules
from hf_prune.parts.selection import top_units
from hf_prune.parts.structures import Slices
from hf_prune.tiny_models import tiny_image_model, tiny_text_model
from hf_prune.types import Plan

TABLE = {
    0: (98.2, 91.0, 82.0, 64.0, 46.0, 28.0, 10.0),
    5: (90.2, 64.0, 46.0, 28.0, 19.0, 13.6, 10.0),
    10: (83.5, 50.5, 34.0, 20.8, 15.1, 12.0, 10.0),
    50: (54.1, 23.5, 16.5, 12.6, 11.2, 10.4, 10.0),
}
"""mu -> units left after events 1, 5, 10, 20, 30, 40, 50 of 50, of 100 down to 10."""


@pytest.mark.parametrize("mu", TABLE)
def test_units_left_after_each_event(mu: int) -> None:
    schedule = schedules.annealed(mu, 0.0, 0.5, 50)
    for event, left in zip((1, 5, 10, 20, 30, 40, 50), TABLE[mu], strict=True):
        assert 100 - 90 * schedule(event / 100) == pytest.approx(left, abs=0.1)
        # The older form, over N = 100 events of which half are at rest.
        assert 10 + 90 * max(0.0, (100 - 2 * event) / (2 * event * mu + 100)) == pytest.approx(left, abs=0.1)
    assert schedule(0.0) == 0.0 and schedule(0.75) == schedule(1.0) == 1.0


def test_counts_never_rise_and_end_exactly() -> None:
    chance = random.Random(0)
    for _ in range(200):
        units, events, mu = chance.randrange(2, 200), chance.randrange(1, 60), chance.choice([0, 1, 5, 50])
        final = chance.randrange(1, units)
        structure = Slices("w", (units, 1), 0)
        goal = Goal("target_units", final / units)
        select = top_units([structure], goal, scope="per_group", min_keep=0.0)
        schedule, scores = schedules.annealed(mu, 0.0, 0.5, events), {"w": torch.randperm(units).float()}
        counts = [int(select(scores, schedule(e / (2 * events)))["w"].sum()) for e in range(2 * events + 1)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == units and counts[events:] == [final] * (events + 1)


class Regression(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0]


def _regression(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """500 rows of 200 standard normal columns, 10 of which count by 1 at least; noise 0.1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 200, generator=generator, dtype=torch.float64)
    true = torch.zeros(200, dtype=torch.float64)
    places = torch.randperm(200, generator=generator)[:10]
    signs = torch.randint(0, 2, (10,), generator=generator) * 2 - 1
    true[places] = signs * (1 + torch.rand(10, generator=generator, dtype=torch.float64))
    return x, x @ true + 0.1 * torch.randn(500, generator=generator, dtype=torch.float64), true


def test_the_true_support_is_found_and_its_weights_are_not_shrunk() -> None:
    """Ten of ten seeds, equal to least squares on the support, where lasso of that size is smaller."""
    for seed in range(10):
        x, y, true = _regression(seed)
        model, steps = Regression(200), 200
        config = AnnealingConfig(final_sparsity=0.95, include=("layer",), mu=5.0, end=0.5, events=100)
        pruner = Pruner(model, config)
        pruner.attach()
        optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.3))
        pruner.step(0, steps)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().mean()).backward()
            optimizer.step()
            pruner.step(step, steps)
        pruner.finalize()
        found = model.layer.weight.detach()[0]
        support = true != 0
        assert torch.equal(found != 0, support)
        exact = torch.linalg.lstsq(x[:, support], y[:, None]).solution[:, 0]
        assert (found[support] - exact).abs().max() < 1e-6
    lasso = Lasso(alpha=0.3, fit_intercept=False).fit(x.numpy(), y.numpy())
    assert (lasso.coef_ != 0).sum() == 10
    assert abs(lasso.coef_[support]).mean() < found[support].abs().mean() - 0.2


class Parity(nn.Module):
    """One hidden layer of ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(20, 40), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def _survivors(seed: int, config: Any) -> set[int]:
    """Input bits left by a training on the parity of bits 0, 1 and 2."""
    torch.manual_seed(seed)
    x = torch.randint(0, 2, (3000, 20)).float()
    labels, x, model, steps = (x[:, :3].sum(1) % 2).long(), 2 * x - 1, Parity(), 800
    pruner = Pruner(model, config)
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.Adam(model.parameters(), lr=0.01))
    pruner.step(0, steps)
    for step in range(1, steps + 1):
        rows = torch.randint(0, 3000, (200,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
        pruner.step(step, steps)
    return set(pruner.plan["first.weight"].nonzero().flatten().tolist())


@pytest.mark.slow
def test_the_bits_of_a_parity_are_found_while_training_and_not_before() -> None:
    common = {"final_sparsity": 0.85, "include": ("first",), "structure": "column"}
    annealed = [_survivors(seed, AnnealingConfig(**common, begin=0.2, end=0.8, mu=1.0)) for seed in range(10)]
    at_once = [_survivors(seed, AnnealingConfig(**common, end=0.01, events=1)) for seed in range(10)]
    counts = [sum(found == {0, 1, 2} for found in each) for each in (annealed, at_once)]
    assert counts[0] >= 6 and counts[1] == 0, counts


def _run(config: AnnealingConfig, model: Any, batch: dict[str, Tensor], steps: int = 20) -> tuple[Pruner, list[Plan]]:
    pruner = Pruner(model.train(), config, {k: v for k, v in batch.items() if k != "labels"})
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    pruner.step(0, steps)
    seen: list[Plan] = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        pruner.batch_loss(model, batch).backward()
        optimizer.step()
        pruner.step(step, steps)
        seen.append({name: keep.clone() for name, keep in pruner.plan.items()})
    return pruner, seen


TEXT = {"input_ids": torch.arange(24).view(2, 12) % 40, "labels": torch.tensor([0, 1])}
IMAGES = {
    "pixel_values": torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1]),
}


def test_what_is_gone_stays_gone_and_zero_under_adam_and_decay() -> None:
    config = AnnealingConfig(final_sparsity=0.7, events=10)
    pruner, seen = _run(config, tiny_text_model(), TEXT)
    for before, after in pairwise(seen):
        assert all(bool((keep | ~after[name]).all()) for name, keep in before.items())
    for name, keep in seen[-1].items():
        weight = pruner.model.get_submodule(name.removesuffix(".weight")).weight
        assert bool((weight.flatten()[~keep] == 0).all())
    shares = [torch.cat(list(plan.values())).double().mean().item() for plan in seen]
    # 10 events, every step until half-way: 1 - 0.7 (1 - (10 - e) / (10 + 5 e)).
    expected = [1 - 0.7 * (1 - (10 - e) / (10 + 5 * e)) for e in range(1, 11)]
    assert shares[:10] == pytest.approx(expected, abs=5e-3) and shares[10:] == [shares[9]] * 10


def test_channels_are_worth_the_scale_of_their_norm() -> None:
    model = tiny_image_model()
    block = model.resnet.encoder.stages[1].layers[0].layer[0]
    with torch.no_grad():
        block.normalization.weight.copy_(torch.linspace(-1, 1, 16))
    pruner = Pruner(model, AnnealingConfig(target_units=0.5, events=1), {"pixel_values": IMAGES["pixel_values"]})
    pruner.attach()
    name = "resnet.encoder.stages.1.layers.0.layer.0.convolution"
    assert torch.allclose(pruner.recipe.scores()[name], torch.linspace(-1, 1, 16).abs())
    pruner.step(5, 10)
    assert pruner.plan[name].tolist() == [True] * 4 + [False] * 8 + [True] * 4
    stream = next(each for each in pruner.recipe.structures if each.name.endswith("stages.1.layers.0.stream"))
    norms = [name for name in stream.producers if name.endswith("normalization.weight")]
    with torch.no_grad():
        for value, each in enumerate(norms):
            model.get_submodule(each.removesuffix(".weight")).parametrizations.weight.original.fill_(value + 1.0)
    mean_square = sum((value + 1.0) ** 2 for value in range(len(norms))) / len(norms)
    assert len(norms) == 2
    assert torch.allclose(pruner.recipe.scores()[stream.name][pruner.plan[stream.name]], torch.tensor(mean_square**0.5))


def test_neurons_are_worth_what_writes_times_what_reads_them() -> None:
    model = tiny_text_model()
    inputs = {"input_ids": TEXT["input_ids"]}
    pruner = Pruner(model, AnnealingConfig(target_units=0.5), inputs)
    pruner.attach()
    name = next(name for name in pruner.plan if name.endswith("layer.0.intermediate.dense"))
    layer = model.bert.encoder.layer[0]
    into = layer.intermediate.dense.weight.detach().square().mean(1).sqrt()
    out = layer.output.dense.weight.detach().square().mean(0).sqrt()
    expected = into * out / (into * out).mean()
    assert torch.allclose(pruner.recipe.scores()[name], expected, rtol=1e-4)


@pytest.mark.parametrize("scope", ["per_group", "global"])
def test_the_model_is_narrow_long_before_the_end(scope: str) -> None:
    config = AnnealingConfig(target_units=0.3, scope=scope, events=10, cuts=2)
    pruner, seen = _run(config, tiny_image_model(), IMAGES)
    sizes = {name: len(keep) for name, keep in seen[-1].items()}
    kept = {name: int(keep.sum()) for name, keep in seen[-1].items()}
    if scope == "per_group":
        assert all(kept[name] == int(0.3 * size + 0.5) for name, size in sizes.items())
    assert sum(kept.values()) == pytest.approx(0.3 * sum(sizes.values()), abs=1.5)
    name = "resnet.encoder.stages.1.layers.0.layer.0.convolution"
    assert len(pruner.model.get_parameter(f"{name}.parametrizations.weight.original")) == kept[name], "before finalize"


@pytest.mark.slow
def test_annealing_is_as_good_as_removing_the_same_number_at_once() -> None:
    """70 % of the channels of a trained net, equally many steps: within a point, means of six seeds."""
    train, test = digits.load()
    figures: dict[str, list[float]] = {"annealed": [], "at once": []}
    goal = {"target_units": 0.3, "scope": "global", "min_keep": 0.1}
    for seed in range(6):
        dense, _ = digits.train(digits.net(seed), None, train, seed, epochs=15)
        for name, config in (
            ("annealed", AnnealingConfig(**goal, mu=5.0)),
            ("at once", AnnealingConfig(**goal, events=1, end=0.01)),
        ):
            model, _ = digits.train(copy.deepcopy(dense), config, train, seed, epochs=30, lr=0.02)
            figures[name].append(accuracy(model, test))
            assert sum(layer.out_channels for layer in model if isinstance(layer, nn.Conv2d)) == int(0.3 * 144 + 0.5)
    assert fmean(figures["annealed"]) >= fmean(figures["at once"]) - 1.0, figures


def _trainer(folder: Path, **settings: Any) -> PruneTrainer:
    images = torch.randn(32, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": images, "labels": torch.arange(32) % 3}).with_format("torch")
    arguments = TrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    pruning = AnnealingConfig(target_units=0.5, events=5, cuts=3)
    return PruneTrainer(model=tiny_image_model(), args=arguments, train_dataset=rows, pruning=pruning)


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_stopped_between_events_and_cuts_resumes_exactly(tmp_path: Path, step: int) -> None:
    whole = _trainer(tmp_path / "whole")
    whole.train()
    _trainer(tmp_path / "broken", save_strategy="steps", save_steps=step).train()
    resumed = _trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{step}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"target_units": 0.5, "structure": "column"}, "needs final_sparsity with it"),
        ({"target_units": 0.5, "structure": "row"}, "structure must be one of"),
        ({"target_units": 0.5, "mu": -1.0}, "mu must be"),
        ({"target_units": 0.5, "cuts": 0}, "cuts must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AnnealingConfig(**settings)
