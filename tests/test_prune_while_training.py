"""Acceptance of pruning while training: counts, the three scores, masks and cuts alike, what it costs, what is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import noisy_digits as digits
import pytest
import torch
from datasets import Dataset
from fitting import accuracy
from scipy.stats import chisquare
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_prune import Pruner, PruneTrainer, PruneWhileTrainingConfig
from hf_prune.graph import trace
from hf_prune.parts.scores import random_ranks
from hf_prune.parts.structures import Slices
from hf_prune.tiny_models import tiny_image_model, tiny_text_model
from hf_prune.types import Plan


class Net(nn.Module):
    """Two convolutions with norms, of 9 and 13 filters, and a classifier behind their flattened maps."""

    def __init__(self, first: int = 9, second: int = 13) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
        self.conv2, self.norm2 = nn.Conv2d(first, second, 3, stride=2, bias=False), nn.BatchNorm2d(second)
        self.head = nn.Linear(second * 9, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        x = torch.relu(self.norm1(self.conv1(x)))
        logits = self.head(torch.relu(self.norm2(self.conv2(x))).flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


def _batches(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(16, 3, 8, 8, generator=generator, dtype=dtype), "labels": torch.arange(16) % 4}
        for _ in range(count)
    ]


def _attached(model: nn.Module, config: PruneWhileTrainingConfig) -> Pruner:
    batches = _batches(2, next(model.parameters()).dtype)
    pruner = Pruner(model, config, {"x": batches[0]["x"][:2]}, data=batches)
    pruner.attach()
    return pruner


def _train(
    pruner: Pruner, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[int, float], None]
) -> torch.optim.Optimizer:
    model, batches = pruner.model.train(), _batches(5, next(pruner.model.parameters()).dtype)
    wrapped = pruner.wrap(optimizer)
    pruner.step(0, steps)
    for step in range(1, steps + 1):
        wrapped.zero_grad()
        batch = batches[step % 5]
        loss = pruner.loss(model(**batch)["loss"])
        loss.backward()
        wrapped.step()
        pruner.step(step, steps)
        after(step, loss.item())
    return wrapped


@pytest.mark.parametrize("removed", [0.3, 0.5, 0.8])
def test_counts_are_exact_and_survivors_nested(removed: float) -> None:
    """round((1 - p) C) of 9 and of 13 filters stay, and none comes back at any event."""
    torch.manual_seed(0)
    pruner = _attached(Net(), PruneWhileTrainingConfig(target_units=1 - removed, events=5, begin=0.1, end=0.6))
    seen: list[Plan] = []

    def watch(step: int, loss: float) -> None:
        seen.append({name: keep.clone() for name, keep in pruner.plan.items()})

    _train(pruner, torch.optim.SGD(pruner.model.parameters(), lr=0.05, momentum=0.9), 40, watch)
    for name, size in (("conv1", 9), ("conv2", 13)):
        counts = [int(plan[name].sum()) for plan in seen]
        final = int((1 - removed) * size + 0.5)
        assert counts[2] == size and counts[23:] == [final] * 17
        assert {step for step in range(1, 40) if counts[step] < counts[step - 1]} <= {3, 8, 13, 18, 23}
        assert counts[3] == final + int((size - final) * 4 / 5 + 1e-9)
        assert all(bool((a[name] | ~b[name]).all()) for a, b in pairwise(seen))
        assert pruner.model.get_parameter(f"{name}.parametrizations.weight.original").shape[0] == final


def test_known_weights_give_a_known_order() -> None:
    model = Net()
    with torch.no_grad():
        model.conv1.weight.copy_(torch.tensor([3.0, 1, 2, 9, 8, 7, 6, 5, 4])[:, None, None, None].expand(9, 3, 3, 3))
    pruner = _attached(model, PruneWhileTrainingConfig(target_units=6 / 9, events=1, begin=0.5))
    pruner.step(1, 2)
    assert pruner.plan["conv1"].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.filterwarnings("ignore:units that go stay in the model as zeros")
@pytest.mark.parametrize("whole", [False, True], ids=["cut", "masked"])
def test_filters_are_ranked_by_the_inputs_that_are_left(whole: bool) -> None:
    """The largest filters of the second layer owe their size to inputs that are gone."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.conv2.weight[:4, :3] = 100.0
        model.conv2.weight[:4, 3:] *= 1e-3
    pruner = _attached(model, PruneWhileTrainingConfig(target_units=0.5))
    if whole:
        pruner.keep_whole("it is the masked twin of a test")
    before = pruner.recipe.scores()["conv2"]
    assert before[:4].min() > before[4:].max()
    pruner.shrink_now({"conv1": torch.arange(9) >= 3})
    after = pruner.recipe.scores()["conv2"]
    assert after[:4].max() < after[4:].min()


def test_a_silent_channel_goes_first_by_mean_activation() -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm1.bias.uniform_(0.5, 1.0)
        model.norm1.weight[4], model.norm1.bias[4] = 0.0, -1.0  # a constant below zero: silent behind the relu
        model.norm2.weight[2], model.norm2.bias[2] = 0.0, 0.0
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    config = PruneWhileTrainingConfig(target_units=0.9, events=1, begin=0.5, score="mean_activation")
    pruner = _attached(model.train(), config)
    pruner.step(1, 2)
    assert pruner.plan["conv1"].tolist() == [index != 4 for index in range(9)]
    assert not pruner.plan["conv2"][2]
    assert all(
        torch.equal(value, dict(model.named_buffers())[name]) or "hf_prune" in name or "keep" in name
        for name, value in statistics.items()
        if value.shape == dict(model.named_buffers()).get(name, value).shape
    ), "measuring leaves the norms' statistics alone"


def test_mean_activations_by_hand_also_after_a_cut() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    config = PruneWhileTrainingConfig(target_units=0.5, events=2, begin=0.1, score="mean_activation")
    pruner = _attached(model, config)

    def by_hand(keep: Tensor) -> Tensor:
        x = torch.cat([batch["x"] for batch in _batches(2)])
        hidden = torch.relu(pruner.model.norm1(pruner.model.conv1(x))).abs().mean(dim=(0, 2, 3))
        whole = torch.zeros(9).masked_scatter(keep, hidden.detach())
        return whole / whole.mean()

    with torch.no_grad():
        first = pruner.recipe.measured_scores(pruner.calibration)["conv1"]
    assert torch.allclose(first, by_hand(torch.ones(9, dtype=torch.bool)), rtol=1e-4)
    pruner.step(1, 10)
    with torch.no_grad():
        second = pruner.recipe.measured_scores(pruner.calibration)["conv1"]
    assert torch.allclose(second, by_hand(pruner.plan["conv1"]), rtol=1e-4)


def test_the_random_order_is_the_seeds_and_the_groups_alone() -> None:
    first, second = Slices("first", (6, 2), 0), Slices("second", (6, 2), 0)
    assert torch.equal(random_ranks(first, 0), random_ranks(first, 0))
    orders = {tuple(random_ranks(each, seed).tolist()) for each in (first, second) for seed in range(3)}
    assert len(orders) == 6
    places = torch.stack([random_ranks(first, seed) for seed in range(1000)])
    for unit in range(6):
        counts = [int((places[:, unit] == (i + 1) / 6).sum()) for i in range(6)]
        assert chisquare(counts).pvalue > 1e-3


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2),
}


@pytest.mark.filterwarnings("ignore:units that go stay in the model as zeros")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_and_cut_runs_take_the_same_course(optimizer: str) -> None:
    """100 steps with three events in double precision; forgetting the optimizer's moments would tell."""
    torch.manual_seed(0)
    start = Net().double()
    outcomes, losses = [], []
    for whole in (False, True):
        pruner = _attached(copy.deepcopy(start), PruneWhileTrainingConfig(target_units=0.4, events=3))
        if whole:
            pruner.keep_whole("it is the masked twin of a test")
        seen: list[float] = []
        inner = OPTIMIZERS[optimizer](pruner.model.parameters())
        _train(pruner, inner, 100, lambda step, loss, seen=seen: seen.append(loss))
        assert (pruner.model.conv1.weight.shape[0] == 9) == whole
        pruner.finalize()
        outcomes.append(pruner.model.state_dict())
        losses.append(seen)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-10
    assert all((outcomes[0][name] - value).abs().max() < 1e-8 for name, value in outcomes[1].items())


def test_what_is_left_costs_what_the_plan_says() -> None:
    torch.manual_seed(0)
    model = Net()
    dense = trace(model, {"x": torch.randn(2, 3, 8, 8)})
    pruner = _attached(model, PruneWhileTrainingConfig(target_units=0.5, events=2))
    prices: list[tuple[float, float]] = []

    def watch(step: int, loss: float) -> None:
        if step in (1, 9, 19):
            copied, _ = pruner.baked()
            measured = trace(copied.eval(), {"x": torch.randn(2, 3, 8, 8)}).price().multiply_adds
            prices.append((measured, dense.price(pruner.plan).multiply_adds))

    _train(pruner, torch.optim.SGD(model.parameters(), lr=0.05), 20, watch)
    assert all(measured == planned for measured, planned in prices)
    assert prices[0][0] > prices[1][0] > prices[2][0]


@pytest.mark.parametrize("trained", [False, True], ids=["from random weights", "from trained weights"])
@pytest.mark.parametrize("score", ["l1", "mean_activation", "random"])
def test_one_training_in_prune_trainer(tmp_path: Path, score: str, trained: bool) -> None:
    trainer = _trainer(tmp_path / "run", score=score)
    if trained:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    trainer.train()
    assert all(layer["kept"] == layer["units"] // 2 for layer in trainer.report.layers.values())
    assert trainer.model.get_parameter("resnet.encoder.stages.1.layers.0.layer.0.convolution.weight").shape[0] == 8


def _trainer(folder: Path, *, score: str, **settings: Any) -> PruneTrainer:
    images = torch.randn(32, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": images, "labels": torch.arange(32) % 3}).with_format("torch")
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    pruning = PruneWhileTrainingConfig(target_units=0.5, score=score, events=3, begin=0.2, end=0.7)
    return PruneTrainer(model=tiny_image_model(), args=arguments, train_dataset=rows, pruning=pruning)


def test_a_run_stopped_between_two_cuts_resumes_exactly(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", score="mean_activation")
    whole.train()
    _trainer(tmp_path / "broken", score="mean_activation", save_strategy="steps", save_steps=5).train()
    resumed = _trainer(tmp_path / "broken", score="mean_activation")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("score", ["l1", "mean_activation"])
def test_neurons_and_heads_of_a_text_model(score: str) -> None:
    model = tiny_text_model()
    ids = torch.arange(24).view(2, 12) % 40
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    config = PruneWhileTrainingConfig(target_units=0.5, score=score, events=1, begin=0.5)
    pruner = Pruner(model, config, {key: batch[key] for key in ("input_ids", "attention_mask")}, data=[batch])
    pruner.attach()
    pruner.step(1, 2)
    roles = {pruner.graph.groups[name].role for name in pruner.plan}
    assert "neurons" in roles and "heads" in roles
    assert all(int(keep.sum()) == len(keep) // 2 for keep in pruner.plan.values())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"final_sparsity": 0.5}, "does not go with|structure must be"),
        ({"target_units": 0.5, "score": "l3"}, "score must be one of"),
        ({"target_units": 0.5, "events": 0}, "events must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PruneWhileTrainingConfig(**settings)


@pytest.mark.slow
def test_l1_loses_little_and_least_for_less_than_retraining_costs() -> None:
    """80 % of the filters of four convolutions; means of five seeds."""
    train, test = digits.load()
    hits: dict[str | None, list[float]] = {}
    costs: dict[str | None, list[float]] = {}
    for seed in range(5):
        for score in (None, "l1", "mean_activation", "random"):
            pruning = score and PruneWhileTrainingConfig(target_units=0.2, score=score, seed=seed)
            model, costs[score] = digits.train(digits.net(seed), pruning, train, seed, epochs=20)
            hits.setdefault(score, []).append(accuracy(model, test))
    mean = {score: sum(values) / 5 for score, values in hits.items()}
    assert mean["l1"] >= mean["random"] and mean["l1"] >= mean["mean_activation"], mean
    assert mean["l1"] >= mean[None] - 5.0, mean  # a fifth of 24 and 48 filters is little; the abstract: under 1 point
    retrained = sum(costs[None]) + 10 / 20 * len(costs[None]) * costs["l1"][-1]  # 10 epochs more at the final size
    assert sum(costs["l1"]) <= 0.75 * retrained
