"""Acceptance of the PruneNet spec: exact variances, invariances, planted redundancy, constants, determinism, budget."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated_models import IMAGES, answer, scramble
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_prune import MagnitudeConfig, PruneError, PruneNetConfig, Pruner, prune
from hf_prune.graph import trace
from hf_prune.methods.prunenet import _holding, concentration, fit_multipliers
from hf_prune.parts.randomness import generator
from hf_prune.parts.statistics import Point, first_moments, gather, mean_and_variance
from hf_prune.tiny_models import tiny_image_model, tiny_text_model


def test_variance_is_exact_whatever_the_split() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(12, 3, 7, 7) + 2.0
    patches = F.unfold(x, 3, padding=1).movedim(1, 0).flatten(1).double()
    patches = patches - patches.mean(1, keepdim=True)
    covariance = patches @ patches.T / patches.shape[1]
    w = conv.weight.detach().flatten(1).double()
    exact = torch.einsum("ci,ij,cj->c", w, covariance, w)

    def measured(*sizes: int, order: tuple[int, ...] = tuple(range(12))) -> Tensor:
        batches = [{"input": part} for part in x[list(order)].split(list(sizes))]
        return mean_and_variance(gather(conv, batches, {"all": Point("", first_moments)})["all"])[1]

    for variance in (measured(12), measured(5, 1, 6), measured(2, 10, order=(3, 1, 0, 2, *range(11, 3, -1)))):
        assert torch.allclose(variance, exact, rtol=1e-6)


def test_concentration() -> None:
    z = torch.rand(7, generator=generator(0)) + 0.1
    assert torch.allclose(concentration(5 * z), concentration(z))
    assert concentration(torch.full((7,), 0.3)).item() == pytest.approx(1.0)
    assert concentration(torch.eye(7)[2]).item() == pytest.approx(1 / 7)
    assert concentration(torch.tensor([3.0, 4.0])).item() == pytest.approx(49 / 50)


def test_fitting_gathers_importance_where_outputs_allow_it() -> None:
    """Two channels make up the output, two do not: the latter's multipliers fall, the former's stay near 1."""
    needed, q = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.3, 0.3, 0.2, 0.2])

    def divergence(u: list[Tensor]) -> Tensor:
        return 10.0 * (needed * (u[0] - 1)).square().sum()

    (u,) = fit_multipliers([q], divergence, [1.0], weight=0.5, lr=0.05, steps=200)
    assert u[:2].min() > 0.9 and u[2:].max() < 0.6
    (rest,) = fit_multipliers([torch.full((4,), 0.25)], lambda u: u[0].sum(), [1.0], weight=0.5, lr=0.05, steps=0)
    assert torch.allclose(rest, torch.ones(4))


def test_one_share_of_importance_for_all_layers() -> None:
    values = {"a": torch.tensor([0.1, 0.6, 0.3]), "b": torch.tensor([0.25, 0.25, 0.25, 0.25])}
    plan = _holding({name: value.double() for name, value in values.items()}, 0.7, {"a": 1, "b": 1})
    assert plan["a"].tolist() == [False, True, True]
    assert plan["b"].tolist() == [True, True, True, False], "of equal channels the first stay"
    plan = _holding({name: value.double() for name, value in values.items()}, 0.0, {"a": 2, "b": 1})
    assert [int(keep.sum()) for keep in plan.values()] == [2, 1]


class Layers(nn.Module):
    """Three hidden widths one after the other, without norms."""

    def __init__(self, *widths: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = [12, *(widths or (16, 16, 16))]
        self.body = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], 5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        for layer in self.body:
            x = layer(x).relu()
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


X = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
BATCHES = [{"x": part} for part in X.split(100)]
WIDTHS = {"include": ("body.*",), "fit_batches": 40}


def _fit(model: nn.Module, **settings: Any) -> Pruner:
    pruner = Pruner(model, PruneNetConfig(**{**WIDTHS, "target_flops": 0.5, **settings}), BATCHES[0], data=BATCHES)
    pruner.attach()
    return pruner


def _scores(model: nn.Module, **settings: Any) -> dict[str, Tensor]:
    pruner = _fit(copy.deepcopy(model), **settings)
    return pruner.recipe.measured_scores(pruner.calibration)


def test_scores_see_channels_as_their_readers_do() -> None:
    model = Layers()
    plain = _scores(model, fit_batches=0)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.body[0].weight[3] *= 10
        scaled.body[0].bias[3] *= 10
        scaled.body[1].weight[:, 3] /= 10
    after = _scores(scaled, fit_batches=0)
    for name in plain:
        assert torch.allclose(plain[name], after[name], rtol=1e-4)
    own = _scores(scaled, fit_batches=0, view="own")
    assert own["body.0"].argmax() == 3
    order = torch.randperm(16, generator=generator(2))
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        permuted.body[0].weight.copy_(model.body[0].weight[order])
        permuted.body[0].bias.copy_(model.body[0].bias[order])
        permuted.body[1].weight.copy_(model.body[1].weight[:, order])
    assert torch.allclose(_scores(permuted, fit_batches=0)["body.0"], plain["body.0"][order], rtol=1e-4)


def test_scores_by_hand() -> None:
    """Variance of each output times the squared length of the column that reads it, as shares."""
    model = Layers(4, 3)
    with torch.no_grad():
        hidden = model.body[0](X)
    variance = hidden.double().var(0, unbiased=False) * model.body[1].weight.detach().square().sum(0).double()
    assert torch.allclose(_scores(model, fit_batches=0)["body.0"].double(), variance / variance.sum(), rtol=1e-5)
    rectified = hidden.relu().double().var(0, unbiased=False)
    measured = _scores(model, fit_batches=0, view="own", signal="rectified")["body.0"].double()
    assert torch.allclose(measured, rectified / rectified.sum(), rtol=1e-5)


def test_planted_redundancy() -> None:
    model = Layers(32, 32, 32)
    with torch.no_grad():
        model.body[2].weight[:, 8:] = 0.0  # three quarters of the middle layer's channels are read by nothing
    dense = answer(model, {"x": X})
    global_, uniform = copy.deepcopy(model), copy.deepcopy(model)
    _, report = prune(global_, PruneNetConfig(target_flops=0.5, **WIDTHS), BATCHES[0], data=BATCHES)
    kept = [report.layers[f"body.{i}"]["kept"] / 32 for i in range(3)]
    assert kept[1] <= 0.3 and kept[0] >= 0.6 and kept[2] >= 0.6, kept
    prune(uniform, MagnitudeConfig(target_flops=0.5, scope="per_group", include=("body.*",)), BATCHES[0])
    lost = [(answer(each, {"x": X}) - dense).square().mean().item() for each in (global_, uniform)]
    assert lost[0] < lost[1]


def test_a_constant_channel_goes_first_and_leaves_its_mean() -> None:
    model = Layers()
    with torch.no_grad():
        model.body[0].weight[5] = 0.0
        model.body[0].bias[5] = 3.0
    dense = answer(model, {"x": X})
    pruner = _fit(model, fit_batches=0)
    scores = pruner.recipe.measured_scores(pruner.calibration)
    assert scores["body.0"].argmin() == 5
    for gate in pruner.recipe.gates:
        gate.set_keep(torch.arange(16) != 5 if gate.name == "body.0" else torch.ones(16, dtype=torch.bool))
    assert (answer(model, {"x": X}) - dense).abs().max() < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.finalize()
    assert model.body[0].out_features == 15
    assert (answer(model, {"x": X}) - dense).abs().max() < 1e-5


class Convolutions(nn.Module):
    """A constant channel between two convolutions with norms, the second of which may pad."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=padding, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(6, 3)

    def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(self.body(pixel_values).mean((2, 3))))


@pytest.mark.parametrize(("padding", "exact"), [(0, True), (1, False)])
def test_readers_that_pad_cannot_take_a_constant(padding: int, exact: bool) -> None:
    torch.manual_seed(0)
    model = scramble(Convolutions(padding))
    with torch.no_grad():
        model.body[0].weight[2] = 0.0
        model.body[1].bias[2] = 2.0
    dense = answer(model, IMAGES)
    config = PruneNetConfig(target_flops=0.8, include=("body.*",), fit_batches=0)
    pruner = Pruner(model, config, IMAGES, data=[IMAGES])
    pruner.attach()
    gate = next(gate for gate in pruner.recipe.gates if gate.name == "body.0")
    assert pruner.recipe.measured_scores(pruner.calibration)["body.0"].argmin() == 2
    assert gate.function.moves is exact and (gate.function.mean[2] != 0) == exact
    gate.set_keep(torch.arange(8) != 2)
    masked = answer(model, IMAGES)
    pruner.finalize()
    assert ((masked - dense).abs().max() < 1e-5) == exact
    assert (answer(model, IMAGES) - masked).abs().max() < 1e-5


def test_residual_streams_are_one_decision_on_all_their_layers() -> None:
    model = scramble(tiny_image_model(depths=[2, 2]))
    config = PruneNetConfig(target_params=0.6, residual=True, fit_batches=3)
    pruner = Pruner(model, config, IMAGES, data=[IMAGES])
    pruner.attach()
    pruner.step(1, 1)
    assert sum(len(gate.functions) > 1 for gate in pruner.recipe.gates) == 2
    masked = answer(model, IMAGES)
    pruner.finalize()
    assert (answer(model, IMAGES) - masked).abs().max() < 1e-5 * max(1.0, float(masked.abs().max()))


def test_same_answer_twice_and_the_goal_is_met_within_a_unit() -> None:
    plans = []
    for _ in range(2):
        pruner = _fit(Layers(32, 32, 32), fit_batches=20)
        weights = {name: value.clone() for name, value in pruner.model.state_dict().items() if "masks" not in name}
        pruner.step(1, 1)
        plans.append(pruner.plan)
        assert all(torch.equal(value, pruner.model.state_dict()[name]) for name, value in weights.items())
        assert all(parameter.grad is None for parameter in pruner.model.parameters())
    assert all(torch.equal(plans[0][name], plans[1][name]) for name in plans[0])
    graph, plan = pruner.graph.traced, plans[0]
    goal, reached = 0.5 * graph.price().multiply_adds, graph.price(plan).multiply_adds
    dearest = max(graph.price({name: torch.ones(32, dtype=torch.bool)}).multiply_adds
                  - graph.price({name: torch.arange(32) < 31}).multiply_adds for name in plan)  # fmt: skip
    assert goal - dearest <= reached <= goal
    assert len({int(keep.sum()) for keep in plan.values()}) > 1, "widths differ"


def test_ffn_widths_of_a_text_model() -> None:
    ids = {"input_ids": torch.randint(0, 40, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    config = PruneNetConfig(target_params=0.8, fit_batches=3)
    model, report = prune(tiny_text_model().eval(), config, ids, data=[ids])
    assert [layer["kept"] < 32 for layer in report.layers.values()] == [True, True]
    assert trace(model, ids).price().parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"final_sparsity": 0.5}, "needs one goal"),
        ({"target_flops": 1.0}, "removes nothing"),
        ({"target_flops": 0.5, "view": "writer"}, "view must be one of"),
        ({"target_flops": 0.5, "signal": "squared"}, "signal must be one of"),
        ({"target_flops": 0.5, "fit_lr": 0.0}, "fit_lr must be"),
        ({"target_flops": 0.5, "variance_batches": 0}, "variance_batches must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PruneNetConfig(**settings)


def test_an_unreachable_goal_and_missing_data_leave_the_model_alone() -> None:
    for config, complaint in (
        (PruneNetConfig(target_params=0.01), "cannot be reached"),
        (PruneNetConfig(target_params=0.8), "data="),
    ):
        model = tiny_image_model()
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(PruneError, match=complaint):
            Pruner(model, config, IMAGES).attach()
        assert [type(module) for module in model.modules()] == kinds
