"""Acceptance of the feature-relevance spec: rules by hand, conservation, invariance, what goes first, a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_prune import FeatureRelevanceConfig, MagnitudeConfig, PruneConfig, PruneError, Pruner
from hf_prune.methods.feature_relevance import class_weights
from hf_prune.parts.relevance import alpha_beta, propagating
from hf_prune.parts.scores import unit_norms
from hf_prune.tiny_models import tiny_image_model, tiny_text_model


def test_rule_by_hand() -> None:
    x, weight = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, -1.0]]).double()
    one = torch.ones(1, 1).double()
    # z+ = 3, z- = -2: 1 * 2 * 3 / 3 and 2 * -1 * -1 / -2
    assert alpha_beta(F.linear, x, weight, one, alpha=2.0).tolist()[0] == pytest.approx([2.0, -1.0])
    assert alpha_beta(F.linear, x, weight, one, alpha=1.0).tolist()[0] == pytest.approx([1.0, 0.0])
    # One sign only takes all: 3 / 7 and 4 / 7
    for sign in (1.0, -1.0):
        taken = alpha_beta(F.linear, x, sign * torch.tensor([[3.0, 2.0]]).double(), one, alpha=2.0)
        assert taken.tolist()[0] == pytest.approx([3 / 7, 4 / 7])
    # A negative input turns signs around: contributions -3 and -2
    negative = alpha_beta(F.linear, torch.tensor([[-1.0, 2.0]]).double(), weight, one, alpha=2.0)
    assert negative.tolist()[0] == pytest.approx([3 / 5, 2 / 5])


class Residual(nn.Module):
    """Convolutions without bias, a sum of two ways, pools, a head."""

    def __init__(self, norms: bool = False, width: int = 6) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else lambda _: nn.Identity()
        self.stem, self.n0 = nn.Conv2d(2, width, 3, padding=1, bias=False), norm(width)
        self.first, self.n1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.second, self.n2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.head = nn.Linear(width, 10, bias=False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        x = F.max_pool2d(torch.relu(self.n0(self.stem(pixel_values))), 2)
        y = self.n2(self.second(torch.relu(self.n1(self.first(x)))))
        x = torch.relu(y + x)
        logits = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return SequenceClassifierOutput(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(a, b, bias=False) for a, b in ((7, 9), (9, 8), (8, 4)))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.c(torch.relu(self.b(torch.relu(self.a(pixel_values)))))
        return SequenceClassifierOutput(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def _relevance(model: nn.Module, images: Tensor, layers: list[str], alpha: float = 2.0) -> dict[str, Tensor]:
    taps: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: taps.update({name: out}))
        for name in layers
    ]
    with propagating(model, alpha):
        logits = model(pixel_values=images).logits
    for handle in handles:
        handle.remove()
    start = F.one_hot(torch.arange(len(images)) % logits.shape[1], logits.shape[1]).to(logits)
    return dict(zip(taps, torch.autograd.grad(logits, list(taps.values()), start), strict=True))


@pytest.mark.parametrize(
    ("make", "shape", "layers"),
    [(Dense, (5, 7), ["a", "b", "c"]), (Residual, (5, 2, 8, 8), ["head", "stem"])],
)
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_relevance_is_conserved(
    make: Callable[[], nn.Module], shape: tuple[int, ...], layers: list[str], alpha: float
) -> None:
    model = make().double().eval()
    for layer, relevance in _relevance(model, torch.randn(*shape, dtype=torch.float64), layers, alpha).items():
        assert (relevance.flatten(1).sum(1) - 1).abs().max() < 1e-4, layer


def test_both_ways_of_a_sum_share_what_arrives() -> None:
    model = Residual().double().eval()
    images = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    branch = _relevance(model, images, ["second"])["second"].flatten(1).sum(1)
    assert (branch - 1).abs().max() > 1e-3  # the rest went by the skip
    with torch.no_grad():
        model.second.weight.zero_()
    assert _relevance(model, images, ["second"])["second"].abs().max() < 1e-6


def test_values_and_parameters_are_as_always() -> None:
    model = tiny_image_model().eval()
    images = torch.randn(2, 3, 16, 16)
    model.classifier[1].weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(pixel_values=images).logits
    with propagating(model, 2.0):
        got = model(pixel_values=images).logits
    assert torch.equal(expected, got.detach())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_operations_without_a_rule_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.layer(x), 1)

    with pytest.raises(PruneError, match="cannot pass cumsum"), propagating(Odd(), 2.0):
        Odd()(torch.randn(2, 4))


def _batches(count: int = 2, classes: int = 10, channels: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "pixel_values": torch.randn(20, channels, 8, 8, generator=generator),
            "labels": torch.randint(0, classes, (20,), generator=generator),
        }
        for _ in range(count)
    ]


def _pruner(model: nn.Module, config: PruneConfig, batches: list[dict[str, Tensor]]) -> Pruner:
    pruner = Pruner(model, config, {"pixel_values": batches[0]["pixel_values"][:3]}, data=batches)
    pruner.attach()
    return pruner


def _scores(model: nn.Module, batches: list[dict[str, Tensor]], **settings: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model).eval()
    config = FeatureRelevanceConfig(target_units=0.5, include=("stem", "first", "second"), **settings)
    pruner = _pruner(model, config, batches)
    return dict(pruner.recipe.measured_scores(pruner.calibration))


@torch.no_grad()
def _scrambled() -> Residual:
    model = Residual(norms=True).eval()
    for norm in (model.n0, model.n1, model.n2):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.3)
    return model


def test_scaling_a_channel_through_its_norm_changes_no_score() -> None:
    model, batches = _scrambled().double(), _batches()
    batches = [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in batches]
    before = _scores(model, batches)
    with torch.no_grad():
        for each in (model.n1.weight, model.n1.bias):
            each[2] *= 2
        model.second.weight[:, 2] /= 2
    for name, score in _scores(model, batches).items():
        assert (score - before[name]).abs().max() < 1e-6


def test_any_split_gives_the_same_scores() -> None:
    model, (first, second) = _scrambled(), _batches()
    whole = {key: torch.cat([first[key], second[key]]) for key in first}
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 7), slice(7, 30), slice(30, 40))]
    for name, score in _scores(model, [whole]).items():
        assert (score - _scores(model, parts)[name]).abs().max() < 1e-6


def test_scores_against_their_definition() -> None:
    model, batches = _scrambled().double(), _batches(1, classes=3)
    images, labels = batches[0]["pixel_values"].double(), batches[0]["labels"]
    (found,) = (v for k, v in _scores(model, [{"pixel_values": images, "labels": labels}]).items() if k == "first")
    taps: dict[str, Tensor] = {}
    model.first.register_forward_hook(lambda m, i, out: taps.update(first=out))
    with propagating(model, 2.0):
        logits = model(pixel_values=images).logits
    (relevance,) = torch.autograd.grad(logits, [taps["first"]], F.one_hot(labels, 10).double())
    spatial, right = relevance.mean((2, 3)), (logits.argmax(1) == labels).double()
    accuracy = torch.stack([right[labels == k].mean() for k in range(3)])
    weighted = [class_weights(accuracy)[k] * spatial[labels == k].mean(0) for k in range(3)]
    expected = torch.stack(weighted).mean(0).abs()
    assert torch.allclose(found, expected / expected.norm(), atol=1e-9)


def test_class_weights_by_hand() -> None:
    weights = class_weights(torch.tensor([0.9, 0.45, 0.0]))
    assert weights.tolist() == pytest.approx([0.7311, 0.8808, 1.0], abs=1e-4)
    assert class_weights(torch.zeros(2)).tolist() == pytest.approx([0.7311, 0.7311], abs=1e-4)


def test_a_channel_that_nobody_reads_goes_first_however_large() -> None:
    model, batches = _scrambled(), _batches()
    with torch.no_grad():
        model.second.weight[:, 4] = 0.0
        model.first.weight[4] *= 10
    scores = _scores(model, batches)["first"]
    assert scores[4] == 0.0 and (scores > 0).sum() >= 3
    relevance = FeatureRelevanceConfig(target_units=5 / 6, include=("first",), begin=0.0, end=0.5)
    size = MagnitudeConfig(target_units=5 / 6, include=("first",))
    for config, stays in ((relevance, False), (size, True)):
        pruner = _pruner(copy.deepcopy(model), config, batches)
        pruner.step(1, 1)
        assert bool(pruner.plan["first"][4]) is stays


def test_it_is_not_the_size_of_filters() -> None:
    torch.manual_seed(3)
    model, batches = Residual(norms=True, width=32).eval(), _batches()
    pruner = _pruner(model, FeatureRelevanceConfig(target_units=0.5, include=("first",)), batches)
    relevance = pruner.recipe.measured_scores(pruner.calibration)["first"]
    sizes = unit_norms(model, pruner.recipe.structures, order=1)()["first"]
    assert spearmanr(relevance.numpy(), sizes.detach().numpy()).statistic < 0.9


@pytest.mark.parametrize("removal", ["mask", "shrink"])
def test_what_is_pruned_stays_so_under_momentum_and_decay(removal: str) -> None:
    model, batches = _scrambled(), _batches(4)
    config = FeatureRelevanceConfig(target_units=0.5, include=("first",), begin=0.0, end=0.1, rounds=1, removal=removal)
    pruner = _pruner(model, config, batches)
    optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3))
    model.train()
    pruner.step(0, 200)
    gone = ~pruner.plan["first"]
    assert int(gone.sum()) == 3
    for step in range(1, 201):
        optimizer.zero_grad()
        pruner.batch_loss(model, batches[step % 4]).backward()
        optimizer.step()
        pruner.step(step, 200)
        if removal == "mask":
            assert not model.first.weight[gone].any() and not model.second.weight[:, gone].any()
        else:
            assert len(model.first.weight) == 3
    model.eval()
    masked = model(batches[0]["pixel_values"]).logits
    pruner.finalize()
    assert model.first.weight.shape[0] == model.second.weight.shape[1] == 3
    assert (model(batches[0]["pixel_values"]).logits - masked).abs().max() < 1e-5


def test_transformers_pass_relevance_by_the_values() -> None:
    model = tiny_text_model(hidden_act="gelu").eval()
    ids = torch.randint(0, 40, (6, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}
    config = FeatureRelevanceConfig(target_units=0.5, include=("*.intermediate.*",))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, 5] = 0.0
    pruner = Pruner(model, config, {"input_ids": ids, "attention_mask": batch["attention_mask"]}, data=[batch])
    pruner.attach()
    scores = pruner.recipe.measured_scores(pruner.calibration)
    first = scores["bert.encoder.layer.0.intermediate.dense"]
    assert first[5] == 0.0 and int((first > 0).sum()) == 31
    assert all(score.isfinite().all() for score in scores.values())


def test_layers_that_only_gate_others_must_be_excluded() -> None:
    class Gated(Residual):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
            x = torch.relu(self.stem(pixel_values))
            x = x * torch.sigmoid(self.second(torch.relu(self.first(F.adaptive_avg_pool2d(x, 1)))))
            return SequenceClassifierOutput(logits=self.head(x.mean((2, 3))))

    pruner = _pruner(Gated(), FeatureRelevanceConfig(target_units=0.5, include=("first",)), _batches())
    with pytest.raises(PruneError, match="no relevance reaches first, which only gate others"):
        pruner.recipe.measured_scores(pruner.calibration)


def test_labels_are_asked_for() -> None:
    model, (batch, _) = _scrambled(), _batches()
    pruner = _pruner(
        model, FeatureRelevanceConfig(target_units=0.5, include=("first",)), [{"pixel_values": batch["pixel_values"]}]
    )
    with pytest.raises(PruneError, match="one label a row"):
        pruner.recipe.measured_scores(pruner.calibration)


class Small(nn.Module):
    """Four convolutions."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = [1, WIDTH, WIDTH, WIDTH, WIDTH], []
        for place, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if place == 1 else []
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.head(self.body(pixel_values).mean((2, 3)))
        return SequenceClassifierOutput(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


WIDTH = 16


def _patterns(rows: int, seed: int, noise: float) -> dict[str, Tensor]:
    """Ten classes: a wave of one of ten directions and lengths at a random phase, under noise; 16 x 16."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (rows,), generator=generator)
    angle, length = (labels % 5) * torch.pi / 5, torch.where(labels < 5, 1.1, 2.0)
    grid, phase = torch.arange(16.0), 6.3 * torch.rand(rows, 1, 1, generator=generator)
    waves = (length * angle.cos())[:, None, None] * grid[:, None] + (length * angle.sin())[:, None, None] * grid + phase
    return {
        "pixel_values": (torch.cos(waves) + noise * torch.randn(rows, 16, 16, generator=generator))[:, None],
        "labels": labels,
    }


def _accuracy_after(config: PruneConfig | None, seed: int, noise: float) -> float:
    torch.manual_seed(seed)
    train, test, model = _patterns(1280, 0, noise), _patterns(600, 1, noise), Small()
    batches = [{key: value[i : i + 64] for key, value in train.items()} for i in range(0, 1280, 64)]
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps, pruner = 12 * len(batches), None
    if config is not None:
        pruner = Pruner(model, config, {"pixel_values": train["pixel_values"][:3]}, data=batches)
        pruner.attach()
        optimizer = pruner.wrap(optimizer)
        pruner.step(0, steps)
    model.train()
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 0.75 * steps else 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        rate.step()
        if pruner is not None:
            pruner.step(step + 1, steps)
    if pruner is not None:
        pruner.finalize()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(test["pixel_values"]).logits.argmax(1) == test["labels"]).double().mean())


EARLY = {"begin": 0.1, "end": 0.7}


@pytest.mark.slow
def test_half_the_units_go_during_a_run_at_little_cost() -> None:
    relevance = FeatureRelevanceConfig(target_units=0.5, **EARLY, rounds=6, calibration_batches=8)
    ours, dense = (sum(_accuracy_after(c, seed, 1.2) for seed in range(2)) / 2 for c in (relevance, None))
    assert ours >= dense - 1.0


@pytest.mark.slow
def test_better_than_chance_where_channels_are_scarce() -> None:
    relevance = FeatureRelevanceConfig(target_units=0.4, **EARLY, rounds=6, calibration_batches=8)
    ours = sum(_accuracy_after(relevance, seed, 2.5) for seed in range(2)) / 2
    chance = [MagnitudeConfig(target_units=0.4, **EARLY, score="random", seed=seed) for seed in range(2)]
    assert ours >= sum(_accuracy_after(config, seed, 2.5) for seed, config in enumerate(chance)) / 2 + 2.0
