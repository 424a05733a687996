"""Saved, loaded, trained and saved again: a pruned model behaves as any other, and damage is refused."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from narrow_models import MODELS, TEXT, logits, narrow_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_prune
from hf_prune.checkpoint import mark, save_pretrained, standalone, transformers_hook
from hf_prune.checkpoint.encodings import ENCODINGS
from hf_prune.checkpoint.files import check_files
from hf_prune.checkpoint.format import CheckpointTable, Packed, parse, to_dict
from hf_prune.checkpoint.names import packable
from hf_prune.graph.sizes import sync_attributes
from hf_prune.graph.table import tensors_of
from hf_prune.testing import aligned
from hf_prune.types import CheckpointError, PruneError, Report, ShapeTable

ENCODES = ("auto", "none", *ENCODINGS)


def load(folder: Path, like: PreTrainedModel, **kwargs) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if like.config.model_type in ("bert", "distilbert") else None
    return aligned((auto or AutoModelForImageClassification).from_pretrained(folder, **kwargs))


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Every tensor has the same bits, every module the same sizes."""
    tensors, others = tensors_of(model), tensors_of(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    modules = dict(other.named_modules())
    assert all(module.extra_repr() == modules[name].extra_repr() for name, module in model.named_modules())


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "saved"
    save_pretrained(narrow_model("bert")[0], folder)
    return folder


@pytest.fixture
def bert_copy(saved_bert, tmp_path) -> Path:
    """A folder of its own for tests that damage or reuse it."""
    return Path(shutil.copytree(saved_bert, tmp_path / "copy"))


# Round trips


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("encode", ENCODES)
def test_round_trip_is_exact(name, encode, tmp_path):
    model, inputs = narrow_model(name)
    save_pretrained(model, tmp_path / "saved", encode=encode)
    loaded = load(tmp_path / "saved", model)
    assert type(loaded) is type(model)
    assert_same(model, loaded)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_dense_models_are_stock_checkpoints(tmp_path):
    model = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "stock")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "stock")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "stock/model.safetensors").read_bytes()


def test_files_and_report(tmp_path):
    model, _ = narrow_model("bert")
    report = Report("magnitude", {}, {}, 0.9, {}, {"dense": 10, "nonzero": 1, "prunable": 9, "prunable_nonzero": 1})
    save_pretrained(model, tmp_path / "saved", report=report)
    assert json.loads((tmp_path / "saved/pruning.json").read_text()) == report.to_dict()
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "pruning.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_saving_leaves_the_model_alone(tmp_path):
    model, inputs = narrow_model("bert")
    before, config = logits(model, inputs), model.config
    save_pretrained(model, tmp_path / "saved")
    assert model.config is config and not hasattr(config, "quantization_config")
    assert torch.equal(logits(model, inputs), before)


def test_tied_weights_are_stored_once(tmp_path):
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=200
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.masked_fill_(torch.rand(200, 64) < 0.9, 0.0)
    save_pretrained(model, tmp_path / "saved")
    assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "saved/model.safetensors")
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert_same(model, loaded)


def test_int8_tensors_come_back(tmp_path):
    model, _ = narrow_model("bert")
    weight = torch.randint(-128, 127, (100, 32), dtype=torch.int8).masked_fill(torch.rand(100, 32) < 0.9, 0)
    model.bert.embeddings.word_embeddings.weight = nn.Parameter(weight, requires_grad=False)
    save_pretrained(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", model).bert.embeddings.word_embeddings.weight
    assert loaded.dtype == torch.int8 and torch.equal(loaded, weight)


def test_sharded(tmp_path):
    model, inputs = narrow_model("bert", sparsity=0.3)
    save_pretrained(model, tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "saved", model), inputs), logits(model, inputs))
    save_pretrained(model, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors"}
    assert_same(model, load(tmp_path / "saved", model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_dtype_at_load(name, dtype, tmp_path):
    model, _ = narrow_model(name)
    save_pretrained(model, tmp_path / "saved")
    assert_same(model.to(dtype), load(tmp_path / "saved", model, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_at_save(dtype, tmp_path):
    model, _ = narrow_model("bert")
    save_pretrained(model.to(dtype), tmp_path / "saved")
    assert_same(model, load(tmp_path / "saved", model, dtype="auto"))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(device_map, saved_bert):
    model, inputs = narrow_model("bert")
    loaded = load(saved_bert, model, device_map=device_map)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


# Other classes on the same checkpoint


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_model_from_a_head_checkpoint(name, dtype, tmp_path):
    model, _ = narrow_model(name)
    save_pretrained(model, tmp_path / "saved")
    base = AutoModel.from_pretrained(tmp_path / "saved", dtype=dtype)
    expected = tensors_of(model.base_model.to(dtype))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors_of(base).items() if key in expected)
    base.save_pretrained(tmp_path / "base")
    assert_same(base, AutoModel.from_pretrained(tmp_path / "base", dtype=dtype))


@pytest.mark.parametrize("encode", ENCODES)
def test_head_model_from_a_base_checkpoint(encode, tmp_path):
    model, _ = narrow_model("bert")
    save_pretrained(model.bert, tmp_path / "saved", encode=encode)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same(model.bert, loaded.bert)
    assert 0 < loaded.classifier.weight.std() < 0.1  # initialised, as BERT initialises


def test_another_head(saved_bert):
    model, _ = narrow_model("bert")
    loaded = AutoModelForTokenClassification.from_pretrained(saved_bert)
    expected = tensors_of(model.bert)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(loaded.bert).items())


def test_stock_save_of_the_base_inside_a_loaded_head_model(saved_bert, tmp_path):
    loaded = AutoModelForSequenceClassification.from_pretrained(saved_bert)
    loaded.bert.save_pretrained(tmp_path / "base")
    assert_same(loaded.bert, AutoModel.from_pretrained(tmp_path / "base"))


# A loaded model is a plain model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("encode", ["auto", "none"])
def test_stock_save_after_load(name, encode, tmp_path):
    model, inputs = narrow_model(name)
    save_pretrained(model, tmp_path / "saved", encode=encode)
    load(tmp_path / "saved", model).save_pretrained(tmp_path / "stock")
    assert config_of(tmp_path / "stock")["quantization_config"]["encodings"] == {}
    assert torch.equal(logits(load(tmp_path / "stock", model), inputs), logits(model, inputs))


def test_no_trace_of_the_loader(saved_bert):
    loaded = AutoModelForSequenceClassification.from_pretrained(saved_bert)
    assert not hasattr(loaded, "hf_quantizer") or loaded.hf_quantizer is None
    assert not loaded.is_quantized and not hasattr(loaded, "quantization_method")
    assert isinstance(loaded.config.quantization_config, dict)
    assert loaded.half().dtype == torch.float16 and loaded.float().dtype == torch.float32
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_packed_only_checkpoint_leaves_a_stock_config(tmp_path):
    model = BertForSequenceClassification(BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    with torch.no_grad():
        model.bert.pooler.dense.weight.masked_fill_(torch.rand(64, 64) < 0.9, 0.0)
    save_pretrained(model, tmp_path / "saved")
    assert config_of(tmp_path / "saved")["quantization_config"]["encodings"].keys() == {"bert.pooler.dense.weight"}
    loaded = load(tmp_path / "saved", model)
    assert not hasattr(loaded.config, "quantization_config")
    assert_same(model, loaded)


def test_mark_makes_stock_save_loadable(tmp_path):
    model, inputs = narrow_model("vit")
    mark(model)
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(logits(load(tmp_path / "stock", model), inputs), logits(model, inputs))


def test_save_load_save_writes_the_same_files(saved_bert, tmp_path):
    save_pretrained(AutoModelForSequenceClassification.from_pretrained(saved_bert), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved_bert / name).read_bytes()


def test_pruned_again_after_load(saved_bert, tmp_path):
    loaded = AutoModelForSequenceClassification.from_pretrained(saved_bert)
    layer = loaded.bert.encoder.layer[0]
    for linear, dim in ((layer.intermediate.dense, 0), (layer.output.dense, 1)):
        linear.weight = nn.Parameter(linear.weight.detach().narrow(dim, 0, 17).contiguous())
        sync_attributes(linear)
    layer.intermediate.dense.bias = nn.Parameter(layer.intermediate.dense.bias.detach()[:17])
    save_pretrained(loaded, tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.bert.encoder.layer[0].intermediate.dense.out_features == 17
    assert torch.equal(logits(aligned(again), TEXT), logits(loaded, TEXT))


def test_trainer_trains_and_its_checkpoints_load(saved_bert, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(saved_bert)
    rows = [{"input_ids": torch.arange(6), "labels": label} for label in (0, 1, 2, 0)]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_steps=2, use_cpu=True, disable_tqdm=True
    )
    before = model.classifier.weight.detach().clone()
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert not torch.equal(model.classifier.weight, before)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_same(model, loaded)
    resumed = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(saved_bert), args=args, train_dataset=rows
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(model, resumed.model)


def test_pipeline(tmp_path):
    model, _ = narrow_model("vit")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    save_pretrained(model, tmp_path / "saved", processing_class=processor)
    scores = pipeline("image-classification", model=str(tmp_path / "saved"))(Image.new("RGB", (40, 40), (200, 30, 90)))
    assert {entry["label"] for entry in scores} == set(model.config.id2label.values())


# Damage


WORDS = "bert.embeddings.word_embeddings.weight"
FFN = "bert.encoder.layer.0.intermediate.dense.weight"
SELF = "bert.encoder.layer.0.attention.self"


def set_in(*keys_and_value):
    """An edit of the table: set one entry, by its path."""
    *keys, last, value = keys_and_value

    def edit(table, tensors):
        for key in keys:
            table = table[key]
        table[last] = value

    return edit


def set_tensor(name, change):
    """An edit of the file: replace one tensor."""

    def edit(table, tensors):
        tensors[name] = change(tensors[name])

    return edit


def drop_tensor(name):
    return lambda table, tensors: tensors.pop(name)


def drop_key(*keys):
    def edit(table, tensors):
        for key in keys[:-1]:
            table = table[key]
        del table[keys[-1]]

    return edit


DAMAGES = {
    "unknown key": (set_in("shape", {}), "Did you mean 'shapes'"),
    "newer version": (set_in("format_version", 2), "format_version 2"),
    "no version": (drop_key("format_version"), "int format_version"),
    "bool version": (set_in("format_version", True), "int format_version"),
    "shapes no object": (set_in("shapes", [1]), "string keys"),
    "shape no list": (set_in("shapes", FFN, 40), "list of ints"),
    "shape of bools": (set_in("shapes", FFN, [True, 32]), "list of ints"),
    "shape of floats": (set_in("shapes", FFN, [40.0, 32]), "list of ints"),
    "shape of strings": (set_in("shapes", FFN, ["40", 32]), "list of ints"),
    "nested shape": (set_in("shapes", FFN, [[40], 32]), "list of ints"),
    "negative shape": (set_in("shapes", FFN, [-40, 32]), "none negative"),
    "huge shape": (set_in("shapes", FFN, [1 << 62, 32]), "between 0 and 64"),
    "wrong ndim": (set_in("shapes", FFN, [40, 32, 1]), "2 ints"),
    "unknown tensor": (set_in("shapes", "bert.encoder.layer.0.intermediate.dense.wait", [4]), "Did you mean"),
    "another shape than stored": (
        set_in("shapes", "bert.encoder.layer.0.intermediate.dense.bias", [39]),
        "different saves",
    ),
    "unknown module": (set_in("attributes", "bert.encoder.layer.7", {}), "Unknown module"),
    "unknown attribute": (set_in("attributes", SELF, {"heads": 3}), "existing int"),
    "underscore attribute": (set_in("attributes", SELF, {"_parameters": 3}), "existing int"),
    "string attribute": (set_in("attributes", SELF, {"num_attention_heads": "3"}), "list of ints"),
    "bool attribute": (set_in("attributes", SELF, {"num_attention_heads": True}), "list of ints"),
    "attributes no object": (set_in("attributes", SELF, [3]), "string keys"),
    "huge attribute": (set_in("attributes", SELF, {"num_attention_heads": 1 << 50}), "between 0 and"),
    "unknown kind": (set_in("encodings", WORDS, "kind", "zip"), "kind must be one of"),
    "kind no string": (set_in("encodings", WORDS, "kind", ["gap8"]), "kind must be one of"),
    "unknown dtype": (set_in("encodings", WORDS, "dtype", "object"), "dtype must be one of"),
    "other dtype": (set_in("encodings", WORDS, "dtype", "float16"), "different saves"),
    "extra encoding key": (set_in("encodings", WORDS, "file", "/etc/passwd"), "Unknown key"),
    "missing encoding key": (drop_key("encodings", WORDS, "dtype"), "lacks dtype"),
    "encoding of a vector": (set_in("encodings", WORDS, "shape", [3200]), "two dimensions"),
    "encoding of another shape": (set_in("encodings", WORDS, "shape", [101, 32]), "the model needs"),
    "huge encoding": (set_in("encodings", WORDS, "shape", [1 << 40, 1 << 40]), "the model needs"),
    "unknown encoded tensor": (
        set_in("encodings", "bert.x", {"kind": "gap8", "shape": [1, 1], "dtype": "float32"}),
        "Unknown",
    ),
    "encoded side": (
        lambda table, tensors: table["encodings"].update({f"{WORDS}_gaps": table["encodings"][WORDS]}),
        "Unknown tensor",
    ),
    "missing side": (drop_tensor(f"{WORDS}_gaps"), "missing"),
    "missing values": (drop_tensor(WORDS), "missing"),
    "side of another dtype": (set_tensor(f"{WORDS}_gaps", lambda side: side.int()), "different saves"),
    "side with two dimensions": (set_tensor(f"{WORDS}_gaps", lambda side: side.unsqueeze(1)), "different saves"),
    "values with two dimensions": (set_tensor(WORDS, lambda values: values.unsqueeze(1)), "1-D"),
    "too many values": (set_tensor(WORDS, lambda values: values.repeat(100)), "1-D and fit"),
    "one value less": (set_tensor(WORDS, lambda values: values[:-1].clone()), "values, but"),
    "one gap more": (set_tensor(f"{WORDS}_gaps", lambda side: torch.cat([side, side[:1]])), "position|values, but"),
    "gaps past the end": (set_tensor(f"{WORDS}_gaps", lambda side: side.fill_(255)), "reach position"),
}
BITMASK_DAMAGES = {
    "bits without values": (set_tensor(f"{WORDS}_bitmask", lambda side: side.fill_(255)), "3200 values, but"),
    "bitmask too long": (set_tensor(f"{WORDS}_bitmask", lambda side: side.repeat(2)), "800 bytes"),
    "bitmask missing": (drop_tensor(f"{WORDS}_bitmask"), "missing"),
}


def damage(folder: Path, edit) -> None:
    config, tensors = config_of(folder), load_file(folder / "model.safetensors")
    edit(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused(case, bert_copy):
    edit, message = DAMAGES[case]
    damage(bert_copy, edit)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForSequenceClassification.from_pretrained(bert_copy)


@pytest.mark.parametrize("case", BITMASK_DAMAGES)
def test_damaged_bitmask_is_refused(case, tmp_path):
    edit, message = BITMASK_DAMAGES[case]
    save_pretrained(narrow_model("bert")[0], tmp_path / "saved", encode="bitmask")
    damage(tmp_path / "saved", edit)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("left", [0, 7, 1000, -1])
def test_truncated_file_is_refused(left, bert_copy):
    weights = bert_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        AutoModelForSequenceClassification.from_pretrained(bert_copy)


def test_tensor_in_two_shards_is_refused(tmp_path):
    save_pretrained(narrow_model("bert", sparsity=0.3)[0], tmp_path, max_shard_size="40KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="stored twice"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_side_tensor_of_the_models_own_name_is_refused(tmp_path):
    tensors = {"w": torch.ones(1), "w_gaps": torch.zeros(1, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    table = CheckpointTable(encodings={"w": Packed("gap8", (2, 2), "float32")})
    check_files(table, {"w": (2, 2)}, [tmp_path / "model.safetensors"])
    with pytest.raises(CheckpointError, match="also a tensor of the model"):
        check_files(table, {"w": (2, 2), "w_gaps": (1,)}, [tmp_path / "model.safetensors"])


def test_own_tensors_named_like_sides_stay():
    model, _ = narrow_model("bert")
    names = {name: name for name in ("a.weight", "b.weight", "b.weight_gaps")}
    assert packable(model, names, "gaps") == {"a.weight", "b.weight_gaps"}


def test_table_survives_json():
    narrow = ShapeTable({"a.weight": (3, 4)}, {"a": {"heads": 3, "config.sizes": (1, 2)}})
    table = CheckpointTable(narrow, {"a.weight": Packed("gap8", (3, 4), "float32")})
    assert parse(json.loads(json.dumps(to_dict(table)))) == table
    assert parse(to_dict(CheckpointTable())) == CheckpointTable()


# Refusals and failures when saving


def test_gates_must_be_folded_first(tmp_path):
    model, _ = narrow_model("bert")
    nn.utils.parametrize.register_parametrization(model.classifier, "weight", nn.Identity())
    with pytest.raises(PruneError, match="remove parametrizations"):
        save_pretrained(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    model, _ = narrow_model("bert")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "saved")
    with pytest.raises(PruneError, match="gap8"):
        save_pretrained(model, tmp_path / "saved", encode="zip")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="directory"):
        save_pretrained(model, tmp_path / "file")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(PruneError, match="one quantization method"):
        save_pretrained(model, tmp_path / "saved")


class Fails:
    """A tokenizer whose disk is full."""

    def save_pretrained(self, folder):
        (Path(folder) / "vocab.txt").write_text("half")
        raise OSError("No space left on device")


@pytest.mark.parametrize("exists", [True, False])
def test_failing_while_writing_leaves_what_was_there(exists, tmp_path):
    folder = tmp_path / "saved"
    if exists:
        save_pretrained(narrow_model("bert")[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if exists else None
    with pytest.raises(OSError, match="No space"):
        save_pretrained(narrow_model("resnet")[0], folder, processing_class=Fails())
    assert ({path.name: path.read_bytes() for path in folder.iterdir()} if exists else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["saved"] if exists else [])


@pytest.mark.parametrize("moved", range(4))
def test_failing_while_exchanging_leaves_what_was_there(moved, saved_bert, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(saved_bert, tmp_path / "saved"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == moved + 1:
            raise OSError("I/O error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="I/O error"):
        save_pretrained(narrow_model("resnet")[0], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_other_files_stay_and_stale_ones_go(tmp_path):
    model, _ = narrow_model("bert")
    folder = tmp_path / "saved"
    (folder / "runs").mkdir(parents=True)
    for name in (
        "README.md",
        "runs/events",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pruning.json",
    ):
        (folder / name).write_text("old")
    save_pretrained(model, folder)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {"README.md", "runs/events", "config.json", "model.safetensors"}
    assert_same(model, load(folder, model))


# Other Pythons: without hf_prune, with its code in the folder, and how long an import takes


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """What `code` prints in a new Python that cannot see hf_prune unless told where it is."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_hf_prune_every_encoding_fails_loudly(tmp_path):
    for kind in ENCODINGS:
        # No narrow layers: the encoding alone must make it fail.
        model = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
        with torch.no_grad():
            model.bert.pooler.dense.weight.masked_fill_(torch.rand(32, 32) < 0.9, 0.0)
        save_pretrained(model, tmp_path / kind, encode=kind)
        assert not config_of(tmp_path / kind)["quantization_config"]["shapes"]
    code = f"""
import sys
from transformers import AutoModelForSequenceClassification
for kind in {list(ENCODINGS)}:
    try:
        AutoModelForSequenceClassification.from_pretrained(kind)
    except Exception as error:
        print("refused", type(error).__name__)
assert "hf_prune" not in sys.modules
"""
    assert run_python(code, tmp_path).splitlines() == ["refused RuntimeError"] * len(ENCODINGS)


def test_standalone_folder_loads_without_hf_prune(tmp_path):
    model, inputs = narrow_model("bert")
    save_pretrained(model, tmp_path / "saved", standalone=True)
    torch.save(logits(model, inputs), tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModel, AutoModelForSequenceClassification as Auto
inputs = torch.arange(12).view(2, 6)
for folder in ("saved", "again"):
    model = Auto.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(inputs).logits, torch.load("expected.pt"))
    model.save_pretrained("again")
assert AutoModel.from_pretrained("again", trust_remote_code=True).encoder.layer[0].intermediate.dense.out_features == 40
assert model.config.architectures == ["BertForSequenceClassification"]
assert "hf_prune" not in sys.modules
print("loaded")
"""
    assert run_python(code, tmp_path, HF_HOME=str(tmp_path / "home")) == "loaded\n"
    assert_same(model, load(tmp_path / "saved", model))  # with hf_prune its own code is not needed


def test_standalone_names_do_not_collide():
    names: list[str] = []
    for name in standalone._MODULES:
        source = ast.parse(inspect.getsource(importlib.import_module(f"hf_prune.{name}")))
        for node in source.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.append(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                names.extend(target.id for target in getattr(node, "targets", [getattr(node, "target", None)]))
    assert sorted(names) == sorted(set(names))


def test_standalone_refuses_what_no_auto_class_knows(tmp_path):
    class MyBert(BertForSequenceClassification):
        pass

    with pytest.raises(PruneError, match="standalone=False"):
        save_pretrained(MyBert(narrow_model("bert")[0].config), tmp_path / "saved", standalone=True)


@pytest.mark.parametrize(
    "first",
    ["hf_prune", "transformers", pytest.param("transformers.quantizers.auto", marks=pytest.mark.slow)],
)
def test_registered_in_any_order_of_imports_and_only_once(first):
    code = f"""
import {first}, importlib.util
import transformers, hf_prune
assert importlib.util.find_spec("transformers.quantizers.auto")
from hf_prune.checkpoint.registration import register_loader
register_loader()
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
register_loader()
print(AUTO_QUANTIZER_MAPPING["hf_prune"].__name__)
"""
    root = Path(hf_prune.__file__).parents[1]
    assert run_python(code, root, PYTHONPATH=str(root)) == "HfPruneQuantizer\n"


def test_import_adds_little_to_transformers():
    code = """
import transformers, sys, time
start = time.perf_counter()
import hf_prune
print(time.perf_counter() - start < 0.5, "torch" in sys.modules)
"""
    root = Path(hf_prune.__file__).parents[1]
    assert run_python(code, root, PYTHONPATH=str(root)) == "True False\n"


# What transformers does not promise


def test_undocumented_names_are_there():
    """Checked with transformers 5.23.0. Where this fails, read how that version loads before touching the list."""
    transformers_hook.require_undocumented()


def test_missing_undocumented_name_is_named(monkeypatch, saved_bert):
    gone = {transformers_hook.HfQuantizer: ("_no_such_method",)}
    monkeypatch.setattr(transformers_hook, "UNDOCUMENTED", gone)
    with pytest.raises(ImportError, match=r"HfQuantizer\._no_such_method.*5\.23\.0"):
        AutoModelForSequenceClassification.from_pretrained(saved_bert)
