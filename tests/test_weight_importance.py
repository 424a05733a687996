"""Acceptance of the weight-importance spec: linear exactness, invariance to scaling, the collapse of magnitude."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_prune
from hf_prune import MagnitudeConfig, PruneConfig, PruneError, Pruner, WeightImportanceConfig
from hf_prune.methods.weight_importance import diagnose, unit_scores, weight_scores
from hf_prune.parts.curvature import curvature, example_gradients, natural
from hf_prune.parts.structures import group_structure
from hf_prune.tiny_models import tiny_image_model, tiny_text_model


class Regression(nn.Module):
    """A model with a squared loss, mean over rows of half the squared length of the error."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.body(x)
        loss = None if labels is None else (logits - labels).square().sum(-1).mean() / 2
        return SimpleNamespace(logits=logits, loss=loss)


class Classifier(Regression):
    """The same with cross-entropy."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.body(x)
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def _features(spread: float, correlated: bool = True, rows: int = 4000) -> Tensor:
    """`(rows, 12)` whose empirical second moments are exactly what was asked for."""
    x = torch.linalg.qr(torch.randn(rows, 12, dtype=torch.float64))[0] * rows**0.5
    mix = torch.eye(12, dtype=torch.float64)
    if correlated:
        mix = mix + 0.3 * torch.randn(12, 12, dtype=torch.float64) / 12**0.5
    return x @ mix * torch.logspace(-spread / 2, spread / 2, 12, dtype=torch.float64)


def _linear(x: Tensor, seed: int = 0) -> tuple[Regression, list[dict[str, Tensor]]]:
    torch.manual_seed(seed)
    model = Regression(nn.Linear(12, 1, bias=False)).double()
    nn.init.normal_(model.body[0].weight)
    labels = model.body(x).detach()
    return model, [{"x": a, "labels": b} for a, b in zip(x.split(500), labels.split(500), strict=True)]


def test_linear_models_lose_what_covariance_says() -> None:
    x = _features(1.0)
    model, batches = _linear(x)
    beta, moments = model.body[0].weight.detach()[0], x.T @ x / len(x)
    for seed in range(5):
        gone = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.4
        (found,) = natural(model, lambda: batches, [{"body.0.weight": gone[None]}])
        part = torch.where(gone, beta, 0.0)
        assert found == pytest.approx(float(part @ moments @ part) / 2, abs=1e-8)
    singles = natural(model, lambda: batches, [{"body.0.weight": (torch.arange(12) == i)[None]} for i in range(12)])
    expected = torch.tensor(singles, dtype=torch.float64)
    names = ["body.0.weight"]
    covariance = weight_scores(model, curvature(model, batches, names, source="covariance"))
    assert torch.allclose(covariance["body.0.weight"], expected, atol=1e-8, rtol=1e-5)
    fisher = curvature(model, [{key: value[:1200] for key, value in batches[0].items()}], names, source="fisher")
    own = x[:500].square().mean(0)  # the noise of the drawn labels has variance 1: E[g^2] = E[x^2]
    assert torch.allclose(fisher["body.0.weight"][0], own, rtol=0.4)
    hessian = curvature(model, batches * 40, names, source="hessian")["body.0.weight"][0]
    assert (hessian - moments.diagonal()).abs().max() < 0.2 * moments.diagonal().max()


def _excess(config: PruneConfig, spread: float, correlated: bool = True) -> float:
    """Loss that pruning half of twelve features adds, over seeds, as a share of the signal."""
    total = 0.0
    for seed in range(10):
        torch.manual_seed(100 + seed)
        model, batches = _linear(_features(spread, correlated), seed)
        pruned = copy.deepcopy(model)
        hf_prune.prune(pruned, config, {"x": batches[0]["x"]}, data=batches)
        signal = torch.cat([batch["labels"] for batch in batches]).square().mean()
        loss = torch.stack([pruned(**batch).loss for batch in batches]).mean()
        total += float(2 * loss.detach() / signal) / 10
    return total


COVARIANCE = WeightImportanceConfig(final_sparsity=0.5, score="covariance", include=("*",))
MAGNITUDE = MagnitudeConfig(final_sparsity=0.5, include=("*",))


def test_half_the_features_lost_cost_less_than_half_as_much_by_covariance() -> None:
    assert _excess(COVARIANCE, 3.5) < 0.5 * _excess(MAGNITUDE, 3.5)


def test_the_gap_to_magnitude_grows_with_the_spread_of_variances() -> None:
    gaps = [_excess(MAGNITUDE, spread, False) - _excess(COVARIANCE, spread, False) for spread in (0.0, 1.0, 2.0, 3.0)]
    assert abs(gaps[0]) < 1e-9  # whitened: the same
    assert gaps == sorted(gaps) and gaps[-1] > 0.1


def _scaled(factor: float) -> tuple[Classifier, list[dict[str, Tensor]]]:
    """V relu(W x) with W times, and V over, the factor; the same function for each."""
    torch.manual_seed(0)
    model = Classifier(nn.Linear(20, 32, bias=False), nn.ReLU(), nn.Linear(32, 5, bias=False)).double()
    x = torch.randn(256, 20, dtype=torch.float64)
    with torch.no_grad():
        nn.init.normal_(model.body[0].weight, std=20**-0.5)
        nn.init.normal_(model.body[2].weight, std=32**-0.5)
    labels = model.body(x).argmax(-1)
    with torch.no_grad():
        model.body[0].weight *= factor
        model.body[2].weight /= factor
    return model, [{"x": x, "labels": labels}]


def _keeps(model: nn.Module, config: PruneConfig, batches: Any) -> dict[str, Tensor]:
    example = {key: value for key, value in batches[0].items() if key != "labels"}
    pruner = Pruner(copy.deepcopy(model), config, example, data=batches)
    pruner.attach()
    pruner.step(1, 1)
    return {name: keep.clone() for name, keep in pruner.plan.items()}


def _error(model: nn.Module, keeps: dict[str, Tensor], batches: Any) -> float:
    pruned = copy.deepcopy(model)
    for name, keep in keeps.items():
        pruned.get_parameter(name).data *= keep.view_as(pruned.get_parameter(name))
    example = {key: value for key, value in batches[0].items() if key != "labels"}
    with torch.no_grad():
        dense, other = model(**example).logits, pruned(**example).logits
    return float((other - dense).square().sum() / dense.square().sum())


V, W = "body.2.weight", "body.0.weight"
FISHER_70 = WeightImportanceConfig(final_sparsity=0.7, include=("*",))
MAGNITUDE_70 = MagnitudeConfig(final_sparsity=0.7, include=("*",))


def test_masks_do_not_depend_on_how_layers_are_scaled() -> None:
    fisher = {
        factor: _keeps(_scaled(factor)[0], FISHER_70, _scaled(factor)[1]) for factor in (0.25, 1.0, 2.0, 4.0, 8.0)
    }
    for keeps in fisher.values():
        assert torch.equal(keeps[V], fisher[1.0][V]) and torch.equal(keeps[W], fisher[1.0][W])
    magnitude = [_keeps(*(_scaled(f)[0], MAGNITUDE_70, _scaled(f)[1])) for f in (0.25, 1.0, 4.0)]
    assert not torch.equal(magnitude[0][V], magnitude[1][V]) and not torch.equal(magnitude[1][V], magnitude[2][V])


def test_magnitude_removes_a_layer_that_matters() -> None:
    classifier, (batch,) = _scaled(8.0)
    model = Regression(*classifier.body)
    # The noise makes true labels what labels drawn from a normal around the answer are.
    noisy = model(batch["x"]).logits.detach() + torch.randn(256, 5, dtype=torch.float64)
    batches = [{"x": batch["x"], "labels": noisy}]
    magnitude, fisher = (
        _keeps(model, config, batches)
        for config in (MAGNITUDE_70, WeightImportanceConfig(final_sparsity=0.7, score="empirical", include=("*",)))
    )
    assert int(magnitude[V].sum()) == 1  # what a floor leaves
    assert _error(model, magnitude, batches) > 0.8
    assert _error(model, fisher, batches) < 0.3
    assert float(fisher[V].double().mean()) > 0.4


def test_natural_worth_of_a_layer_does_not_fall_with_its_norm() -> None:
    worth, norms = [], []
    for factor in (1.0, 4.0):
        model, batches = _scaled(factor)
        layer = {V: torch.ones_like(model.body[2].weight, dtype=torch.bool)}
        worth.append(natural(model, lambda batches=batches: batches, [layer])[0])
        norms.append(float(model.body[2].weight.detach().square().sum()))
    assert worth[0] == pytest.approx(worth[1], abs=1e-6)
    assert norms[1] == pytest.approx(norms[0] / 16)


def test_natural_worth_against_the_values_before_training() -> None:
    """A network that begins with V small puts more of the task into V, whose norm stays lowest."""
    torch.manual_seed(0)
    x = torch.randn(512, 10, dtype=torch.float64)
    labels = (
        Regression(nn.Linear(10, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False)).double().body(x).detach()
    )
    worth, norms = [], []
    for factor in (1.0, 2.0, 4.0):
        torch.manual_seed(1)
        model = Regression(nn.Linear(10, 64, bias=False), nn.ReLU(), nn.Linear(64, 3, bias=False)).double()
        with torch.no_grad():
            model.body[0].weight *= factor
            model.body[2].weight /= factor
        before = {V: model.body[2].weight.detach().clone()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02 / factor**2)
        for _ in range(300):
            optimizer.zero_grad()
            model(x, labels).loss.backward()
            optimizer.step()
        batches = [{"x": x, "labels": labels}]
        layer = {V: torch.ones_like(model.body[2].weight, dtype=torch.bool)}
        worth.append(natural(model, lambda batches=batches: batches, [layer], before)[0])
        norms.append(float(model.body[2].weight.detach().norm()))
    assert worth == sorted(worth) and norms == sorted(norms, reverse=True)


def test_scaled_value_and_output_projections_keep_their_masks() -> None:
    model = tiny_text_model().double().eval()
    ids = torch.randint(0, 40, (12, 9))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}]
    scaled = copy.deepcopy(model)
    block = scaled.bert.encoder.layer[0].attention
    with torch.no_grad():
        block.self.value.weight *= 8
        block.self.value.bias *= 8
        block.output.dense.weight /= 8
    inputs = {key: value for key, value in batches[0].items() if key != "labels"}
    assert torch.allclose(model(**inputs).logits, scaled(**inputs).logits, atol=1e-9)
    fisher = [_keeps(each, WeightImportanceConfig(final_sparsity=0.6), batches) for each in (model, scaled)]
    magnitude = [_keeps(each, MagnitudeConfig(final_sparsity=0.6), batches) for each in (model, scaled)]
    assert all(torch.equal(keep, fisher[1][name]) for name, keep in fisher[0].items())
    assert not all(torch.equal(keep, magnitude[1][name]) for name, keep in magnitude[0].items())
    assert _error(scaled, fisher[1], batches) < _error(scaled, magnitude[1], batches)


def _explicit(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    found = []
    for row in range(8):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        found.append(model.bert.encoder.layer[0].intermediate.dense.weight.grad.double().clone())
    return found


def test_curvature_squares_the_gradient_of_each_example() -> None:
    model = tiny_text_model().eval()
    ids = torch.randint(0, 40, (8, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    h = curvature(model, [batch], [name], source="empirical")[name]
    split = [{key: value[i : i + 3] for key, value in batch.items()} for i in (0, 3, 6)]
    gradients = _explicit(model, batch)
    squares = torch.stack(gradients).square().mean(0)
    assert torch.allclose(h, squares, rtol=1e-6, atol=1e-18)
    assert torch.allclose(curvature(model, split, [name], source="empirical")[name], h, rtol=1e-5, atol=1e-18)
    assert not torch.allclose(torch.stack(gradients).mean(0).square(), squares, rtol=0.1)


def test_labels_are_drawn_from_the_answer_alike_whatever_the_split() -> None:
    model, (batch,) = _scaled(1.0)
    split = [{key: value[i : i + 100] for key, value in batch.items()} for i in (0, 100, 200)]
    whole, parts = (curvature(model, each, [V], source="fisher", seed=3)[V] for each in ([batch], split))
    assert torch.equal(whole, parts)
    other = curvature(model, [batch], [V], source="fisher", seed=4)[V]
    assert not torch.equal(whole, other)
    # E over labels of the gradient's square at the logits: sum over classes of p_k (p - e_k)^2 = p (1 - p).
    p = model(batch["x"]).logits.softmax(-1)
    hidden = model.body[:2](batch["x"])
    expected = torch.einsum("bo,bi->oi", p * (1 - p), hidden.square()) / len(p)
    assert float((whole - expected).norm() / expected.norm()) < 0.3


def test_convolutions_weigh_what_each_tap_reads() -> None:
    model = tiny_image_model().eval()
    images = torch.randn(4, 3, 12, 12)
    name = "resnet.embedder.embedder.convolution.weight"
    found = curvature(model, [{"pixel_values": images}], [name], source="covariance")[name]
    conv = model.get_submodule(name.removesuffix(".weight"))
    patches = F.unfold(images, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    assert torch.allclose(found, patches.double().square().mean((0, 2)).view(1, 3, 7, 7).expand(8, -1, -1, -1))


def test_units_keep_their_cross_terms() -> None:
    torch.manual_seed(0)
    model = Regression(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    from hf_prune.graph import trace

    group = trace(model.body, (x,)).groups["0"]
    units = [group_structure(group, model.body)]
    wrapped = Regression.__new__(Regression)
    nn.Module.__init__(wrapped)
    wrapped.body = model.body
    renamed = [type(units[0])(_renamed(group), tuple((f"body.{name}", shape) for name, shape in units[0].shapes))]
    scores = unit_scores(wrapped, [{"x": x, "labels": labels}], renamed, sampled=False)["0"]
    hidden = torch.relu(model.body[0](x))
    error = model.body(x) - labels
    gate = error * hidden * model.body[2].weight  # derivative by a factor on each unit, (rows, 3)
    assert torch.allclose(scores, gate.square().mean(0) / 2)


def _renamed(group: Any) -> Any:
    from dataclasses import replace

    return replace(group, members=tuple(replace(m, tensor=f"body.{m.tensor}") for m in group.members))


def test_diagnosis_names_the_layer_that_magnitude_would_remove() -> None:
    model, batches = _scaled(8.0)
    before = copy.deepcopy(model.state_dict())
    found = {each.layer: each for each in diagnose(model.train(), batches, sparsity=0.7, include=("*",))}
    assert found["body.2"].kept_by_magnitude == 0.0 < found["body.2"].kept_by_fisher
    assert "would remove" in str(found["body.2"].warning)
    assert found["body.2"].natural > 0
    assert found["body.0"].warning is None and found["body.0"].correlation > 0.3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training


def test_labels_are_asked_for() -> None:
    model, (batch,) = _scaled(1.0)
    with pytest.raises(PruneError, match="labels"):
        next(iter(example_gradients(model, [{"x": batch["x"]}], [V], sampled=False)))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"final_sparsity": 0.5, "score": "natural"}, "score must be one of"),
        ({"target_params": 0.5, "score": "hessian"}, "score must be one of"),
        ({"final_sparsity": 0.5, "rounds": 0}, "rounds must be"),
        ({}, "needs one goal"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        WeightImportanceConfig(**settings)
