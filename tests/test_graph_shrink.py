"""What `trace` and `shrink` promise: models left as they were, clear refusals, tables that the loader can replay."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import check_exact, difference, even_plan, outputs
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel
from zoo import ZOO, build

import hf_prune.graph as graph_package
from hf_prune.graph import check_exactness, example_inputs, mask, shrink, trace, unit_indices
from hf_prune.graph.resize import resize
from hf_prune.types import Member, PruneError

FFN = "bert.encoder.layer.0.intermediate.dense"
NAMES = ["BertForSequenceClassification", "GPT2ForSequenceClassification", "LlamaForSequenceClassification"]
NAMES += ["ResNetForImageClassification", "SegformerForImageClassification"]


@pytest.fixture
def bert() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    return build("BertForSequenceClassification")


def state_of(model: nn.Module) -> dict[str, dict]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_trace_leaves_the_model_as_it_was(bert, training) -> None:
    model, inputs = bert
    model.train(training)
    before, tensors = state_of(model), copy.deepcopy(model.state_dict())
    trace(model, inputs)
    assert state_of(model) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_frozen_and_meta_models_trace_alike(bert) -> None:
    model, inputs = bert
    wanted = trace(model, inputs).groups
    assert trace(model.requires_grad_(False), inputs).groups == wanted
    assert trace(model.to("meta"), inputs).groups == wanted


def test_example_inputs_come_from_the_config(bert) -> None:
    for model in (bert[0], build("ViTForImageClassification")[0]):
        assert trace(model.float()).groups.keys() == trace(model, example_inputs(model)).groups.keys()
    with pytest.raises(PruneError, match="example_inputs"):
        trace(nn.Linear(2, 2))


def test_a_forward_that_fails_is_named(bert) -> None:
    with pytest.raises(PruneError, match="BertForSequenceClassification could not be traced"):
        trace(bert[0], {"input_ids": torch.zeros(2, 2, 2, dtype=torch.long)})


def test_group_names_and_roles(bert) -> None:
    groups = trace(*bert).groups
    attention = "bert.encoder.layer.0.attention.self"
    assert {name: groups[name].role for name in groups if "layer.1" not in name} == {
        "bert.stream": "stream",
        f"{attention}.heads": "heads",
        f"{attention}.head_width": "head_width",
        FFN: "neurons",
        "bert.pooler.dense": "neurons",
    }
    assert [name for name, group in groups.items() if group.normalised] == ["bert.stream"]
    assert groups[FFN].members == (
        Member(f"{FFN}.weight", 0, pitch=128),
        Member(f"{FFN}.bias", 0, pitch=128),
        Member("bert.encoder.layer.0.output.dense.weight", 1, reads=True, pitch=128),
    )


def test_unit_indices_of_heads_in_a_fused_dimension() -> None:
    keys = Member("qkv.weight", 0, outer=1, inner=2, start=6, pitch=6)
    assert unit_indices(keys, 3).tolist() == [[6, 7], [8, 9], [10, 11]]
    width = Member("qkv.weight", 0, outer=3, inner=1, pitch=2)
    assert unit_indices(width, 2).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_meta_models_shrink_like_real_ones(bert) -> None:
    model, inputs = bert
    graph = trace(model, inputs)
    plan = even_plan(graph.groups.values(), 0.4)
    meta = copy.deepcopy(model).to("meta")
    assert shrink(meta, trace(meta, inputs), plan) == shrink(model, graph, plan)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in meta.state_dict().items()} == wanted


@pytest.mark.parametrize("name", NAMES)
def test_the_loader_replays_the_table(name) -> None:
    model, inputs = build(name)
    dense = copy.deepcopy(model)
    graph = trace(model, inputs)
    table = shrink(model, graph, even_plan(graph.groups.values(), 0.4))
    resize(dense, table)
    dense.load_state_dict(model.state_dict())
    assert difference(outputs(model, inputs), outputs(dense, inputs)) == 0.0


def test_parameters_keep_identity_and_ties() -> None:
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model = BertForMaskedLM(config).eval()
    inputs = {"input_ids": torch.arange(14).view(2, 7)}
    before = dict(model.named_parameters())
    graph = trace(model, inputs)
    shrink(model, graph, even_plan(graph.groups.values(), 0.5))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.bert.embeddings.word_embeddings.weight.shape == (60, 16)
    assert model.bert.embeddings.word_embeddings.embedding_dim == 16


def test_check_exactness(bert) -> None:
    model, inputs = bert
    groups = trace(model, inputs).groups
    exact = even_plan([group for group in groups.values() if not group.normalised], 0.5)
    assert check_exactness(model, inputs, exact) < 1e-10
    assert check_exactness(model, inputs, even_plan([groups["bert.stream"]], 0.5)) > 1e-3


@pytest.mark.parametrize("name", ["BigBirdForSequenceClassification", "ImageGPTForImageClassification"])
def test_weights_take_over_a_scale_that_follows_the_width(name) -> None:
    """BigBird computes the scale from an attribute; ImageGPT reads a shape, and its query is part of a fused weight."""
    model, inputs = build(name)
    graph = trace(model, inputs)
    groups = [group for group in graph.groups.values() if group.role == "head_width" and not group.normalised]
    assert groups
    assert check_exactness(model, inputs, even_plan(groups, 0.5)) < 1e-10


BAD_PLANS = {
    "unknown": ({"bert.encoder.layer.0.intermediate.dens": torch.ones(128).bool()}, FFN),
    "frozen": ({"classifier.weight[0]": torch.ones(10).bool()}, "model output"),
    "size": ({FFN: torch.ones(127).bool()}, r"shape \(128,\)"),
    "dtype": ({FFN: torch.ones(128)}, "bool"),
    "empty": ({FFN: torch.zeros(128).bool()}, "at least 1"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_that_does_not_fit_leaves_the_model_untouched(bert, case) -> None:
    model, inputs = bert
    plan, message = BAD_PLANS[case]
    graph, before = trace(model, inputs), copy.deepcopy(model.state_dict())
    good = even_plan([graph.groups["bert.pooler.dense"]], 0.5)
    with pytest.raises(PruneError, match=message):
        shrink(model, graph, good | plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_stale_graph_is_refused(bert) -> None:
    model, inputs = bert
    graph = trace(model, inputs)
    plan = even_plan([graph.groups[FFN]], 0.5)
    shrink(model, graph, plan)
    with pytest.raises(PruneError, match="Trace the model again"):
        shrink(model, graph, plan)


def test_hooks_and_parametrizations_are_refused(bert) -> None:
    model, inputs = bert
    layer = model.bert.encoder.layer[0].intermediate.dense
    handle = layer.register_forward_hook(lambda *_: None)
    graph = trace(model, inputs)
    with pytest.raises(PruneError, match="has hooks"):
        shrink(model, graph, even_plan([graph.groups[FFN]], 0.5))
    handle.remove()
    torch.nn.utils.parametrizations.weight_norm(layer)
    graph = trace(model, inputs)
    parametrized = {name: group for name, group in graph.groups.items() if "pooler" in name}
    shrink(model, graph, even_plan(parametrized.values(), 0.5))


class Caching(nn.Module):
    """Keeps what it made of its weight until it trains again, as fast image models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(8, 3)
        self.unused = nn.Linear(3, 3)
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        if mode:
            self.cache = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "doubled" not in self.cache:
            self.cache["doubled"] = self.a.weight.mT * 2
        return self.b(torch.tanh(x @ self.cache["doubled"]))


def test_what_modules_cache_is_dropped() -> None:
    model, inputs = Caching(), {"x": torch.randn(2, 5)}
    model.eval()
    outputs(model, inputs)
    cached = model.cache["doubled"]
    graph = check_exact(model, inputs, 1e-6)
    assert graph.groups.keys() == {"a"}
    assert graph.frozen["unused.weight[0]"].frozen == "no operation uses it"
    assert model.cache["doubled"] is cached


class Masked(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5


def test_a_parametrized_tensor_is_not_cut() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Masked())
    graph = trace(model, (torch.randn(2, 5),))
    with pytest.raises(PruneError, match="parametrization"):
        shrink(model, graph, even_plan(graph.groups.values(), 0.5))


def test_mask_keeps_shapes(bert) -> None:
    model, inputs = bert
    graph = trace(model, inputs)
    mask(model, graph, even_plan([graph.groups[FFN]], 0.25))
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert weight.shape == (128, 64)
    assert int((weight == 0).all(1).sum()) == 32


def test_public_names_exist() -> None:
    assert all(hasattr(graph_package, name) for name in graph_package.__all__)
    assert len(ZOO) > 90
