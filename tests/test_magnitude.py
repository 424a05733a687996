"""Magnitude pruning: hand-computed scores, goals met by price, one call from a dense model to a loadable narrow one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_prune
from hf_prune import MagnitudeConfig, MovementConfig, PruneError
from hf_prune.graph import trace
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.structures import Elements, Slices
from hf_prune.testing import aligned
from hf_prune.tiny_models import tiny_image_model, tiny_text_model

IMAGES = {"pixel_values": torch.randn(2, 3, 17, 17)}


def _resnet() -> nn.Module:
    return tiny_image_model(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2]).eval()


def test_scores_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    rows, elements = Slices("0.weight", (2, 2), 0), Elements("0.weight", (2, 2))
    assert unit_norms(model, [rows], order=1)()["0.weight"].tolist() == [3.5, 0.5]
    assert unit_norms(model, [rows], order=2)()["0.weight"].tolist() == pytest.approx([12.5**0.5, 0.5**0.5])
    assert unit_norms(model, [elements], order=1)()["0.weight"].tolist() == [3.0, 4.0, 1.0, 0.0]


@pytest.mark.parametrize("scope", ["global", "per_group"])
@pytest.mark.parametrize(
    ("goal", "price"),
    [("target_flops", "multiply_adds"), ("target_params", "parameters"), ("target_bytes", "bytes")],
)
def test_goal_is_met_within_one_percent(goal: str, price: str, scope: str) -> None:
    model = _resnet()
    dense = getattr(trace(model, IMAGES).price(), price)
    hf_prune.prune(model, MagnitudeConfig(**{goal: 0.5}, scope=scope), IMAGES)
    kept = getattr(trace(model, IMAGES).price(), price) / dense
    assert 0.49 <= kept <= 0.5


def test_uniform_scope_keeps_the_same_share_of_each_group() -> None:
    _, report = hf_prune.prune(_resnet(), MagnitudeConfig(target_flops=0.5, scope="per_group"), IMAGES)
    shares = [layer["kept"] / layer["units"] for layer in report.layers.values()]
    assert max(shares) - min(shares) < 1 / 16


def test_pruned_model_loads_and_gives_the_same_logits(tmp_path: Path) -> None:
    model, report = hf_prune.prune(_resnet(), MagnitudeConfig(target_flops=0.5), IMAGES)
    hf_prune.save_pretrained(model, tmp_path, report=report)
    loaded = aligned(type(model).from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(**IMAGES).logits, loaded(**IMAGES).logits)
    again, _ = hf_prune.prune(loaded, MagnitudeConfig(target_params=0.7), IMAGES)
    assert again(**IMAGES).logits.isfinite().all()


def test_text_models_lose_neurons_and_heads_but_no_hidden_width() -> None:
    model, report = hf_prune.prune(
        tiny_text_model().eval(), MagnitudeConfig(target_flops=0.6), tiny_text_model().dummy_inputs | {}
    )
    assert model.config.hidden_size == 16 and model.bert.embeddings.word_embeddings.weight.shape[1] == 16
    assert any(layer["kept"] < layer["units"] for layer in report.layers.values())


def test_small_filters_go_first() -> None:
    model = _resnet()
    layer = model.resnet.encoder.stages[0].layers[0].layer[0].convolution
    with torch.no_grad():
        layer.weight[::2] *= 1e-3
    _, report = hf_prune.prune(model, MagnitudeConfig(target_flops=0.9, scope="per_group"), IMAGES)
    name = next(n for n in report.layers if n.startswith("resnet.encoder.stages.0.layers.0.layer.0"))
    removed = set(range(32)) - set(report.layers[name]["indices"])
    assert removed and all(unit % 2 == 0 for unit in removed)


def test_random_depends_on_the_seed_and_on_nothing_else() -> None:
    plans = []
    for seed in (0, 0, 1):
        _, report = hf_prune.prune(_resnet(), MagnitudeConfig(target_flops=0.5, score="random", seed=seed), IMAGES)
        plans.append({name: layer["indices"] for name, layer in report.layers.items()})
    assert plans[0] == plans[1] != plans[2]
    equal_sized = [indices for name, indices in plans[0].items() if report.layers[name]["units"] == 32]
    assert len({tuple(indices) for indices in equal_sized}) == len(equal_sized) > 1


def test_include_and_exclude_choose_groups() -> None:
    config = MagnitudeConfig(target_flops=0.8, include=("*.layers.*.layer.0.*",), exclude=("*stages.1*",))
    _, report = hf_prune.prune(_resnet(), config, IMAGES)
    assert report.layers and all(name.startswith("resnet.encoder.stages.0.layers") for name in report.layers)


def test_an_excluded_layer_keeps_its_columns_too() -> None:
    model = _resnet()
    layer = model.resnet.encoder.stages[0].layers[0].layer[1].convolution
    before = layer.weight.detach().clone()
    name = "resnet.encoder.stages.0.layers.0.layer.1.convolution"
    hf_prune.prune(model, MagnitudeConfig(target_flops=0.7, exclude=(name,)), IMAGES)
    assert torch.equal(layer.weight, before)


def test_an_unreachable_goal_leaves_the_model_alone() -> None:
    model = _resnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneError, match="cannot be reached"):
        hf_prune.prune(model, MagnitudeConfig(target_flops=0.001, min_keep=0.5), IMAGES)
    after = {n.replace("parametrizations.", "").replace(".original", ""): v for n, v in model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_methods_that_train_say_so() -> None:
    with pytest.raises(PruneError, match="PruneTrainer"):
        hf_prune.prune(tiny_text_model(), MovementConfig(final_sparsity=0.5))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"final_sparsity": 0.5, "structure": "group"}, "does not go with"),
        ({"target_flops": 0.5, "structure": "element"}, "does not go with"),
        ({"target_flops": 1.0}, "removes nothing"),
        ({"target_flops": 0.5, "score": "l3"}, "score must be one of"),
        ({"max_metric_drop": 1.0}, "needs one goal"),
    ],
)
def test_bad_settings(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        MagnitudeConfig(**settings)
