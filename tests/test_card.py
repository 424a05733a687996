"""Model cards: metadata that the Hub takes, numbers of the run and no others, and reports that read back or refuse."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetInfo, NamedSplit
from hub_server import metadata_errors
from huggingface_hub import ModelCard
from transformers import TrainingArguments

import hf_prune
from hf_prune import MagnitudeConfig, PruneError, PruneTrainer
from hf_prune.methods import METHODS, load
from hf_prune.report.card import GENERATED, About, make_card, write_card
from hf_prune.report.origin import base_model, describe_dataset, scores
from hf_prune.report.reading import parse_report, read_history, read_report
from hf_prune.tiny_models import tiny_text_model
from hf_prune.types import CheckpointError, Report

SPLITS = {"validation": "eval", "test": "test"}
SECTIONS = [
    "# tiny",
    "## Use",
    "## Size and speed",
    "## Results",
    "## Training",
    "## Pruning",
    "## Limits",
    "## Citation",
]
CARDS = sorted((Path(__file__).parent.parent / "model_cards").glob("*.md"))
LATENCY = {
    "machine": "a test machine",
    "dense": {"median_ms": 2.0, "low_ms": 1.5, "high_ms": 2.5},
    "kept": {"median_ms": 1.0, "low_ms": 0.75, "high_ms": 1.25},
}


def rows(split: str, count: int) -> Dataset:
    ids = torch.randint(0, 40, (count, 6), generator=torch.Generator().manual_seed(0))
    info = DatasetInfo(dataset_name="numbers", config_name="small", download_checksums={
        "hf://datasets/someone/numbers@0123abc/data.parquet": {"num_bytes": 1, "checksum": None},
    })  # fmt: skip
    data = {
        "input_ids": ids.tolist(),
        "attention_mask": torch.ones_like(ids).tolist(),
        "labels": (ids[:, 0] % 3).tolist(),
    }
    return Dataset.from_dict(data, info=info, split=NamedSplit(split))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> PruneTrainer:
    """A finished run, evaluated on validation and test rows."""
    folder = tmp_path_factory.mktemp("run") / "tiny-pruned"
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=4, save_strategy="no", seed=3,
    )  # fmt: skip
    model = tiny_text_model()
    model.config._name_or_path = "someone/dense"
    run = PruneTrainer(
        model=model, args=arguments, train_dataset=rows("train", 16), eval_dataset=rows("validation", 8),
        pruning=MagnitudeConfig(target_flops=0.5, structure="group"), teacher="self",
        compute_metrics=lambda _: {"accuracy": 0.625},
    )  # fmt: skip
    run.train()
    run.evaluate()
    run.predict(rows("test", 4))
    run.save_model()
    return run


@pytest.fixture
def folder(trainer: PruneTrainer) -> Path:
    return Path(trainer.args.output_dir)


def test_metadata(folder: Path) -> None:
    card = make_card(folder, About(license="mit", language=("en",), tags=("mine",)))
    assert metadata_errors(str(card)) == []
    data = ModelCard(str(card)).data
    assert data.to_dict() == card.data.to_dict()
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.tags == ["pruned", "hf_prune", "magnitude", "mine"]
    assert (data.base_model, data.datasets, data.metrics) == ("someone/dense", ["someone/numbers"], ["accuracy"])
    assert (data.license, data.language) == ("mit", ["en"])


def test_model_index_has_every_score(folder: Path, trainer: PruneTrainer) -> None:
    results = ModelCard(str(make_card(folder))).data.eval_results
    found = {(each.dataset_split, each.metric_type): each.metric_value for each in results}
    losses = {split: trainer.report.metrics[f"{name}_loss"] for split, name in SPLITS.items()}
    assert found == {
        (split, metric): value
        for split, loss in losses.items()
        for metric, value in (("loss", loss), ("accuracy", 0.625))
    }
    assert {(each.dataset_type, each.dataset_name, each.dataset_config) for each in results} == {
        ("someone/numbers", "numbers", "small")
    }


def test_text(folder: Path, trainer: PruneTrainer) -> None:
    text, report = str(make_card(folder, About(name="someone/tiny"))), trainer.report
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert block.startswith("import hf_prune") and text.index("```python") < text.index("```json")
    assert 'AutoModelForSequenceClassification.from_pretrained("someone/tiny")' in block
    for kind in ("multiply_adds", "parameters", "bytes"):
        price = report.prices[kind]
        assert f"| {price['dense']:,.0f} | {price['kept']:,.0f} | {price['kept'] / price['dense']:.1%} |" in text
    assert f"{(folder / 'model.safetensors').stat().st_size:,}" in text
    assert report.paper["bibtex"].strip() in text and f"{report.sparsity:.1%} of its prunable weights" in text
    for part in ("| seed | 3 |", "| steps | 4 |", "| distillation temperature | 2.0 |", "| training rows | 16 |"):
        assert part in text
    assert all(f"`{name}`" in text for name in report.layers)
    assert "latency" not in text.lower()
    assert re.findall("^#+ .*$", text.replace("# before", "before"), re.MULTILINE) == SECTIONS


def test_its_code_block_runs(folder: Path) -> None:
    block = re.search(r"```python\n(.*?)```", str(make_card(folder, About(name=str(folder)))), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(compile(block, "card", "exec"), names)
    assert type(names["model"]).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize("status", ["read", "reconstruction"])
def test_status_and_latency(folder: Path, tmp_path: Path, status: str) -> None:
    report = read_report(folder)
    report = dataclasses.replace(report, latency=LATENCY, paper={**report.paper, "status": status})
    hf_prune.save_pretrained(tiny_text_model(), tmp_path / "x", report)
    text = str(make_card(tmp_path / "x"))
    assert ("is a reconstruction" in text) == (status == "reconstruction")
    assert "| latency, ms | 2.00 (1.50 to 2.50) | 1.00 (0.75 to 1.25) | 50.0% |" in text
    assert "measured on a test machine" in text


def test_names_of_strangers_stay_in_their_cells(folder: Path, tmp_path: Path) -> None:
    report = read_report(folder)
    layers = {"a|b\n# c": {"structure": "<script>", "units": 4, "kept": 2}}
    hostile = {
        "layers": layers,
        "base_model": "x](y)\n# z",
        "config": {"a": "```\n# q"},
        "metrics": {"eval_f1": float("nan")},
    }
    hf_prune.save_pretrained(tiny_text_model(), tmp_path / "x", dataclasses.replace(report, **hostile))
    text = str(make_card(tmp_path / "x"))
    assert "`a\\|b # c`" in text and "<script>" not in text
    assert not re.search("^# [zq]", text, re.MULTILINE) and text.count("```") == 6
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_what_a_card_prints(method: str, tmp_path: Path) -> None:
    module = load(method)
    paper, config = dataclasses.asdict(module.PAPER), next(iter(module.TINY.values())).to_dict()
    report = Report(method, config, paper, 0.5, {}, {"dense": 20, "prunable": 10, "kept": 5})
    hf_prune.save_pretrained(tiny_text_model(), tmp_path / "x", report)
    text = str(make_card(tmp_path / "x"))
    assert metadata_errors(text) == [] and module.PAPER.title in text and "\n@" in text


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_of_the_demo_models(path: Path) -> None:
    text = path.read_text()
    assert GENERATED in text and metadata_errors(text) == []
    assert re.findall("^#+ .*$", text.replace("# before", "before"), re.MULTILINE)[1:] == SECTIONS[1:]
    results = ModelCard(text).data.eval_results
    assert {each.dataset_split for each in results} == {"validation", "test"}
    assert all(f"| {each.metric_type} | {each.metric_value:.4f} |" in text for each in results)


def test_written_where_asked(folder: Path, tmp_path: Path) -> None:
    assert write_card(folder).read_text() == str(make_card(folder))
    (folder / "README.md").unlink()
    other = write_card(folder, About(name="a/b"), to=tmp_path / "cards/b.md")
    assert other.read_text() == str(make_card(folder, About(name="a/b"))) and not (folder / "README.md").exists()
    assert GENERATED in other.read_text()


def test_trainer_writes_it(trainer: PruneTrainer, folder: Path) -> None:
    trainer.create_model_card(language="en", license="mit", tags="mine", dataset_tags=["a/b"], finetuned_from="c/d")
    data = ModelCard((folder / "README.md").read_text()).data
    assert (data.base_model, data.datasets, data.license, data.tags[-1]) == ("c/d", ["a/b"], "mit", "mine")
    (folder / "README.md").unlink()


def test_report_reads_back(folder: Path, trainer: PruneTrainer) -> None:
    assert read_report(folder) == trainer.report
    assert [entry for entry in read_history(folder) if "eval_loss" in entry]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"sparsty": 1}, "Did you mean 'sparsity'"),
    "no number": ({"sparsity": "0.5"}, "sparsity must be float"),
    "bool for a number": ({"sparsity": True}, "sparsity must be float"),
    "no object": ({"layers": []}, "layers must be dict"),
    "no paper": ({"paper": {"title": "x"}}, "paper is no Paper"),
    "unknown status": ({"paper": {"title": "", "authors": "", "year": 1, "bibtex": "", "status": "?"}}, "paper is no"),
    "metric": ({"metrics": {"eval_accuracy": "high"}}, "metrics.eval_accuracy must be a number"),
    "counts": ({"parameters": {"dense": 1}}, "parameters must have dense, prunable, kept"),
    "price": ({"prices": {"bytes": {"dense": 1.0}}}, "prices.bytes must have dense, kept"),
    "unknown price": ({"prices": {"byte": {}}}, "Did you mean 'bytes'"),
    "latency": ({"latency": {"machine": "x"}}, "latency.dense must have median_ms"),
    "dataset": ({"datasets": {"eval": 1}}, "datasets.eval must be an object"),
    "base model": ({"base_model": 1}, "base_model must be str"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_reports_are_refused(case: str, folder: Path) -> None:
    change, message = BROKEN[case]
    raw = json.loads((folder / "pruning.json").read_text())
    assert parse_report(raw) == read_report(folder)
    with pytest.raises(CheckpointError, match=message):
        parse_report(raw | change)
    for key in ("method", "parameters"):
        with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
            parse_report({name: value for name, value in raw.items() if name != key})


def test_missing_and_unreadable_reports(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match=r"has no pruning.json.*report=report"):
        read_report(tmp_path)
    assert read_history(tmp_path) == []
    (tmp_path / "pruning.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must be an object"):
        read_report(tmp_path)
    for name, read in (("pruning.json", read_report), ("trainer_state.json", read_history)):
        (tmp_path / name).write_text('{"log_')
        with pytest.raises(CheckpointError, match="cannot be read as JSON"):
            read(tmp_path)


def test_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_text_model()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local/model").mkdir(parents=True)
    names = {
        "": None,
        "someone/dense": "someone/dense",
        "gpt2": "gpt2",
        "local/model": None,
        "/a/b": None,
        "../x": None,
    }
    for name, expected in names.items():
        model.config._name_or_path = name
        assert base_model(model) == expected, name
    unknown = {"name": None, "id": None, "config": None, "split": None}
    assert describe_dataset([1, 2]) == {**unknown, "rows": 2} and describe_dataset(iter(())) == {
        **unknown,
        "rows": None,
    }
    assert scores({"eval_f1": 1, "eval_runtime": 2.0, "epoch": 3, "eval_note": "x"}, "eval") == {"eval_f1": 1.0}
