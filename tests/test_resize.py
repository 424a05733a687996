"""Tables of narrow shapes: replayed, read off a model, refused when they make no sense."""

from __future__ import annotations

import copy

import pytest
import torch
from narrow_models import MODELS, bert, logits, mobilenet, narrow_model, resnet
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D
from zoo import GROUPED, build

from hf_prune.checkpoint import mark, save_pretrained
from hf_prune.graph import shrink, trace
from hf_prune.graph.resize import resize, shape_table
from hf_prune.graph.sizes import sync_attributes
from hf_prune.graph.table import tensors_of
from hf_prune.testing import aligned
from hf_prune.types import CheckpointError, ShapeTable


def rebuilt(model):
    return type(model)(copy.deepcopy(model.config))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_replayed_table_gives_every_tensor_its_shape(name, device):
    build, _ = MODELS[name]
    with torch.device(device):
        model, table = build()
    before = {key: (tensor.dtype, tensor.device, tensor.requires_grad) for key, tensor in tensors_of(model).items()}
    resize(model, table)
    tensors = tensors_of(model)
    assert {key: tuple(tensors[key].shape) for key in table.shapes} == dict(table.shapes)
    assert {key: (tensor.dtype, tensor.device, tensor.requires_grad) for key, tensor in tensors.items()} == before


@pytest.mark.parametrize("name", MODELS)
def test_table_read_off_a_model_rebuilds_it(name):
    model, inputs = narrow_model(name)
    table = shape_table(model, lambda: rebuilt(model))
    again = rebuilt(model)
    resize(again, table)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))
    assert {key: str(module) for key, module in again.named_modules()} == {
        key: str(module) for key, module in model.named_modules()
    }


def test_dense_model_has_an_empty_table():
    model, _ = bert()
    assert not shape_table(model, lambda: rebuilt(model))


def test_attributes_of_modules_with_narrow_tensors_are_found():
    model, _ = narrow_model("bert")
    table = shape_table(model, lambda: rebuilt(model))
    assert table.attributes == {"bert.encoder.layer.0.attention.self": {"num_attention_heads": 3, "all_head_size": 24}}


def test_attributes_elsewhere_are_compared_only_when_recorded():
    model, _ = bert()
    attention = model.bert.encoder.layer[1].attention.self
    attention.num_attention_heads = 2
    name = "bert.encoder.layer.1.attention.self"
    assert not shape_table(model, lambda: rebuilt(model))
    table = shape_table(model, lambda: rebuilt(model), ShapeTable(attributes={name: {"num_attention_heads": 0}}))
    assert table.attributes == {name: {"num_attention_heads": 2}}


def test_config_attribute_belongs_to_one_module():
    model, _ = bert()
    name = "bert.encoder.layer.0.attention.self"
    resize(model, ShapeTable(attributes={name: {"config.num_attention_heads": 2, "config.hidden_size": 16}}))
    config = model.get_submodule(name).config
    assert (config.num_attention_heads, config.hidden_size) == (2, 16)
    assert (model.config.num_attention_heads, model.config.hidden_size) == (4, 32)
    recorded = ShapeTable(attributes={name: {"config.num_attention_heads": 0, "config.hidden_size": 0}})
    assert shape_table(model, lambda: rebuilt(model), recorded).attributes == {
        name: {"config.num_attention_heads": 2, "config.hidden_size": 16}
    }


def test_tied_parameters_stay_tied():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    model = BertForMaskedLM(config)
    resize(model, ShapeTable({"bert.embeddings.word_embeddings.weight": (80, 32)}))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.out_features == 80 == model.bert.embeddings.word_embeddings.num_embeddings
    disagreeing = {"bert.embeddings.word_embeddings.weight": (80, 32), "cls.predictions.decoder.weight": (70, 32)}
    with pytest.raises(CheckpointError, match="ties"):
        resize(BertForMaskedLM(config), ShapeTable(disagreeing))


def test_added_tensors_are_no_narrow_model():
    model, _ = bert()
    torch.nn.utils.parametrize.register_parametrization(model.classifier, "weight", nn.Identity())
    with pytest.raises(CheckpointError, match="parametrizations"):
        shape_table(model, lambda: rebuilt(model))


FFN = "bert.encoder.layer.0.intermediate.dense.weight"
SELF = "bert.encoder.layer.0.attention.self"
CONV = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
BAD_TABLES = {
    "unknown tensor": (bert, {"bert.encoder.layer.0.intermediate.dense.wieght": (40, 32)}, {}, "Did you mean"),
    "negative": (bert, {FFN: (-1, 32)}, {}, "between 0 and 64"),
    "huge": (bert, {FFN: (1 << 60, 32)}, {}, "between 0 and 64"),
    "wrong ndim": (bert, {FFN: (40,)}, {}, "2 ints"),
    "bool": (bert, {FFN: (True, 32)}, {}, "2 ints"),
    "float": (bert, {FFN: (40.0, 32)}, {}, "2 ints"),
    "no embeddings": (bert, {"bert.embeddings.word_embeddings.weight": (0, 32)}, {}, "between 1 and 100"),
    "no channels": (resnet, {CONV: (0, 8, 3, 3)}, {}, "between 1 and 8"),
    "smaller kernel": (resnet, {CONV: (8, 8, 1, 3)}, {}, "between 3 and 3"),
    "unknown module": (bert, {}, {"bert.encoder.layer.9": {"num_attention_heads": 1}}, "Unknown module"),
    "unknown attribute": (bert, {}, {SELF: {"number_of_heads": 1}}, "existing int"),
    "underscore": (bert, {}, {SELF: {"_version": 1}}, "existing int"),
    "config underscore": (bert, {}, {SELF: {"config._x": 1}}, "existing int"),
    "bool attribute": (bert, {}, {SELF: {"training": 1}}, "existing int"),
    "method": (bert, {}, {SELF: {"forward": 1}}, "existing int"),
    "bool value": (bert, {}, {SELF: {"num_attention_heads": True}}, "must be like"),
    "tuple for int": (bert, {}, {SELF: {"num_attention_heads": (1, 2)}}, "must be like"),
    "negative value": (bert, {}, {SELF: {"num_attention_heads": -1}}, "between 0 and"),
    "huge value": (bert, {}, {SELF: {"num_attention_heads": 1 << 40}}, "between 0 and"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_table_is_refused_before_anything_changes(case):
    build, shapes, attributes, message = BAD_TABLES[case]
    model, table = build()
    before = dict(tensors_of(model))
    heads = model.get_submodule(SELF).num_attention_heads if build is bert else None
    with pytest.raises(CheckpointError, match=message):
        resize(model, ShapeTable(dict(table.shapes) | shapes, attributes))
    after = tensors_of(model)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert build is not bert or model.get_submodule(SELF).num_attention_heads == heads


def narrow_to(module: nn.Module, **shapes: tuple[int, ...]) -> nn.Module:
    for name, shape in shapes.items():
        setattr(module, name, nn.Parameter(torch.zeros(shape)))
    sync_attributes(module)
    return module


def test_sizes_follow_tensors():
    assert narrow_to(nn.Linear(8, 6), weight=(5, 7)).extra_repr() == "in_features=7, out_features=5, bias=True"
    conv1d = narrow_to(Conv1D(6, 8), weight=(7, 5))
    assert (conv1d.nf, conv1d.nx) == (5, 7)
    assert narrow_to(nn.LayerNorm(8), weight=(5,)).normalized_shape == (5,)
    assert narrow_to(nn.RMSNorm(8), weight=(5,)).normalized_shape == (5,)
    assert narrow_to(nn.GroupNorm(2, 8), weight=(6,)).num_channels == 6
    assert narrow_to(nn.BatchNorm2d(8), weight=(5,)).num_features == 5
    embedding = narrow_to(nn.Embedding(9, 8), weight=(7, 5))
    assert (embedding.num_embeddings, embedding.embedding_dim) == (7, 5)


@pytest.mark.parametrize(
    ("conv", "weight", "sizes"),
    [
        (nn.Conv2d(8, 6, 3), (5, 7, 3, 3), (7, 5, 1)),
        (nn.Conv2d(8, 16, 3, groups=8), (10, 1, 3, 3), (5, 10, 5)),
        (nn.Conv2d(8, 16, 3, groups=4), (12, 2, 3, 3), (8, 12, 4)),
        (nn.ConvTranspose2d(8, 6, 3), (7, 5, 3, 3), (7, 5, 1)),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), (5, 1, 3, 3), (5, 5, 5)),
    ],
    ids=["plain", "depthwise", "grouped", "transposed", "transposed depthwise"],
)
def test_conv_sizes_follow_tensors(conv, weight, sizes):
    for _ in range(2):  # a second call must change nothing
        narrow_to(conv, weight=weight)
        assert (conv.in_channels, conv.out_channels, conv.groups) == sizes


def test_depthwise_block_runs():
    model, table = mobilenet()
    resize(model, table)
    assert model.mobilenet_v2.layer[0].conv_3x3.convolution.groups == 30


def test_frequencies_of_rotary_embeddings_lose_the_entries_of_dropped_pairs(tmp_path):
    model, inputs = build("LlamaForSequenceClassification", torch.float32)
    full = model.model.rotary_emb.inv_freq.clone()
    for kept in ([0, 2, 3, 5, 6, 7], [0, 1, 4]):  # the second of what the first leaves
        graph = trace(model, inputs)
        width = graph.groups["model.layers.head_width"]
        mark(model, shrink(model, graph, {width.name: torch.isin(torch.arange(width.size), torch.tensor(kept))}))
    assert torch.equal(model.model.rotary_emb.inv_freq, full[[0, 2, 6]])
    table = model.config.quantization_config
    assert table["buffers"] == {"model.rotary_emb.inv_freq": [0, 2, 6]}
    save_pretrained(model, tmp_path)
    loaded = aligned(AutoModelForSequenceClassification.from_pretrained(tmp_path).eval())
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    encoder = AutoModel.from_pretrained(tmp_path)  # has its names without a prefix
    assert torch.equal(encoder.rotary_emb.inv_freq, full[[0, 2, 6]])


def test_frequencies_that_change_with_the_length_of_the_text_stay():
    config = LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    graph = trace(LlamaForCausalLM(config).eval())
    assert not [name for name, group in graph.groups.items() if group.role == "head_width"]


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ({"model.rotary_emb.inv_freq": (3, 1)}, "ascending"),
        ({"model.rotary_emb.inv_freq": (0, 8)}, "of its 8 entries"),
        ({"model.rotary_emb.inv_freq": ()}, "one or more"),
        ({"model.rotary_emb.inv_frequency": (0,)}, "Did you mean 'model.rotary_emb.inv_freq'"),
        ({"lm_head.weight": (0,)}, "Unknown buffer"),
    ],
)
def test_hostile_tables_of_buffers_are_refused(buffers, message):
    model = LlamaForCausalLM(LlamaConfig(**GROUPED))
    with pytest.raises(CheckpointError, match=message):
        resize(model, ShapeTable(buffers=buffers))
    assert len(model.model.rotary_emb.inv_freq) == 8
