"""The command line: what it prints, how it fails, and that it does what the same calls in Python do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cli import cli
from tiny_files import save_image_model, save_reviews, save_text_model

import hf_prune
from hf_prune import MagnitudeConfig, MovementConfig, methods
from hf_prune.checkpoint.load import load_pretrained
from hf_prune.cli.data import Source
from hf_prune.cli.fields import describe, parse
from hf_prune.cli.tasks import Reading, batches_for
from hf_prune.graph import example_inputs
from hf_prune.report import sensitivity
from hf_prune.report.reading import read_report

HEAVY = ("torch", "transformers", "datasets", "rich", "matplotlib")


def test_help_waits_for_nothing_heavy() -> None:
    code = f"import sys, hf_prune.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    root = Path(hf_prune.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
    listed = cli("--help").out
    assert all(name in listed for name in ("train", "prune", "inspect", "bench", "report", "doctor", "methods", "push"))
    assert cli("--version").out.strip() == hf_prune.__version__


def test_methods_lists_them_all() -> None:
    rows = cli("methods", "--json").result
    assert [row["method"] for row in rows] == list(methods.METHODS)
    assert all(name[:8] in cli("methods").out for name in methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_option_of_every_method_has_help(name: str) -> None:
    about = cli("methods", name, "--json").result
    assert [each["name"] for each in about["fields"]] == [each.name for each in fields(methods.load(name).Config)]
    assert all(each["help"] for each in about["fields"]), [e["name"] for e in about["fields"] if not e["help"]]


def _options() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "--final-sparsity 0.9 --variant soft", {"final_sparsity": 0.9, "variant": "soft"}
    yield "--final-sparsity=0.9 --block-shape 4 8", {"final_sparsity": 0.9, "block_shape": (4, 8)}
    yield "--include a.* --include b.*", {"include": ("a.*", "b.*")}
    yield "--no-freeze-embeddings --seed 3", {"freeze_embeddings": False, "seed": 3}
    yield "--freeze-embeddings=false", {"freeze_embeddings": False}


@pytest.mark.parametrize(("words", "values"), list(_options()))
def test_words_become_fields(words: str, values: dict[str, Any]) -> None:
    assert parse(describe(MovementConfig), words.split()) == (values, [])


@pytest.mark.parametrize(("kind", "goal"), [("text", {"final_sparsity": 0.5}), ("image", {"target_flops": 0.5})])
def test_prune_does_what_python_does(kind: str, goal: dict[str, float], tmp_path: Path) -> None:
    path = {"text": save_text_model, "image": save_image_model}[kind](tmp_path / "model")
    options = [word for name, value in goal.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = cli(
        "prune", "-m", path, "-o", tmp_path / "cli", "--method", "magnitude", "--score", "l2", *options, "--json"
    )
    model = load_pretrained(path).eval()
    _, report = hf_prune.prune(model, MagnitudeConfig(score="l2", **goal), example_inputs(model))
    hf_prune.save_pretrained(model, tmp_path / "python", report=report)
    assert done.result["sparsity"] == report.sparsity
    for name in ("model.safetensors", "config.json", "pruning.json"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "python" / name).read_bytes(), name
    kept = {"text": "tokenizer.json", "image": "preprocessor_config.json"}[kind]
    assert (tmp_path / "cli" / kept).exists()


def test_inspect_lists_groups_and_finds_shrinking_exact(tmp_path: Path) -> None:
    result = cli("inspect", save_text_model(tmp_path / "model"), "--check", "--plans", 1, "--json").result
    groups = {group["name"]: group for group in result["groups"]}
    assert groups["bert.encoder.layer.0.attention.self.heads"]["size"] == 2
    assert groups["classifier.weight[0]"]["frozen"] == "model output"
    assert groups["bert.stream"]["normalised"]
    assert result["check"]["exact"] and result["check"]["groups"] == 7


def test_inspect_lists_whole_layers(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path / "model")
    (stack,) = cli("inspect", folder, "--layers", "--json").result["layers"]
    assert stack == {"name": "bert.encoder.layer", "layers": 2, "can_go": [0, 1], "exact": False, "frozen": {}}
    assert "can go" in cli("inspect", folder, "--layers").out


def test_inspect_says_where_shrinking_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_prune.graph.verify.mask", lambda model, graph, plan: None)  # masks nothing
    done = cli("inspect", save_image_model(tmp_path / "model"), "--check", "--plans", 1)
    assert done.code == 1 and "NOT exact" in done.out


def test_diagnosis_names_a_layer_that_magnitude_would_remove(tmp_path: Path) -> None:
    folder, data = save_text_model(tmp_path / "model"), save_reviews(tmp_path / "reviews.csv")
    model = load_pretrained(folder)
    block = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        block.self.value.weight *= 100
        block.self.value.bias *= 100
        block.output.dense.weight /= 100
    model.save_pretrained(folder)
    words = ["inspect", folder, "--diagnose", "-d", data, "--rows", 8]
    found = {each["layer"]: each for each in cli(*words, "--json").result["diagnosis"]}
    scaled_down = found["bert.encoder.layer.0.attention.output.dense"]
    assert scaled_down["kept_by_magnitude"] == 0.0 < scaled_down["kept_by_fisher"]
    assert "would remove" in scaled_down["warning"]
    assert cli(*words).code == 0


def test_sensitivity_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path / "cache"))
    model, data = save_text_model(tmp_path / "model"), save_reviews(tmp_path / "reviews.csv")
    words = ["inspect", model, "--sensitivity", "-d", data, "--plot", tmp_path / "plot.png", "--json"]
    first = cli(*words).result["sensitivity"]
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    head = first["losses"]["bert.pooler.dense"]
    assert len(head) == 9 and any(loss != first["dense_loss"] for loss in head)
    loaded = load_pretrained(model).eval()
    batches = [dict(batch) for batch in batches_for(model, loaded, Source(data, rows=128), Reading())]
    assert first["dense_loss"] == pytest.approx(sensitivity.mean_loss(loaded, batches))

    monkeypatch.setattr(sensitivity, "mean_loss", lambda *_: pytest.fail("measured again"))
    assert cli(*words).result["sensitivity"] == first


def test_report_draws_and_counts(tmp_path: Path) -> None:
    model = save_text_model(tmp_path / "model")
    assert cli("prune", "-m", model, "-o", tmp_path / "out", "--method", "magnitude", "--target-params", 0.6).code == 0
    log = [{"step": 5, "loss": 0.7, "sparsity": 0.1}, {"step": 10, "eval_loss": 0.6, "eval_accuracy": 0.8}]
    (tmp_path / "out" / "checkpoint-10").mkdir()
    (tmp_path / "out" / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    result = cli("report", tmp_path / "out", "--json").result
    assert [Path(plot).name for plot in result["plots"]] == ["sparsity.png", "widths.png", "heads.png", "curves.png"]
    assert all(Path(plot).read_bytes()[:4] == b"\x89PNG" for plot in result["plots"])
    assert result["history"] == log
    heads = next(row for row in result["layers"] if row["layer"].endswith("heads"))
    assert heads["units"] == 2 and heads["removed"] == 1 - heads["kept"] / 2
    assert json.loads((tmp_path / "out" / "report" / "report.json").read_text()) == result


def test_doctor_finds_this_installation_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    findings = {each["name"]: each for each in cli("doctor", "--json").result}
    assert all(each["ok"] for each in findings.values())
    assert {"torch", "loading hook", "machine", "folders", "round trip"} <= findings.keys()


def test_doctor_says_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path / "file" / "cache"))
    done = cli("doctor")
    assert done.code == 1 and "BROKEN" in done.out


def test_bench_measures_models_in_turn_and_notes_it_for_the_card(tmp_path: Path) -> None:
    dense, pruned = save_image_model(tmp_path / "dense"), tmp_path / "pruned"
    assert cli("prune", "-m", dense, "-o", pruned, "--method", "magnitude", "--target-flops", 0.5).code == 0
    forms = ["--form", "plain", "--form", "channels_last", "--threads", 1, "--threads", 2]
    result = cli(
        "bench", dense, pruned, *forms, "--rounds", 2, "--image-size", 16, "--batch-size", 3, "--save", "--json"
    )
    times = result.result["times"]
    assert result.result["inputs"] == {"pixel_values": [3, 3, 16, 16]}
    assert {(row["model"], row["form"], row["threads"]) for row in times} == {
        (str(model), form, count)
        for model in (dense, pruned)
        for form in ("plain", "channels_last")
        for count in (1, 2)
    }
    assert all(0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in times)
    assert all(row["speedup"] == 1.0 for row in times if row["model"] == dense)
    latency = read_report(pruned).latency
    assert latency["kept"] == {name: times[1][name] for name in ("median_ms", "low_ms", "high_ms")}
    assert "1 threads, plain, pixel_values 3 x 3 x 16 x 16" in latency["machine"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler of C++")
def test_bench_compiles_dense_and_pruned_models(tmp_path: Path) -> None:
    dense, pruned = save_image_model(tmp_path / "dense"), tmp_path / "pruned"
    assert cli("prune", "-m", dense, "-o", pruned, "--method", "magnitude", "--target-flops", 0.5).code == 0
    times = cli("bench", dense, pruned, "--form", "compile", "--rounds", 2, "--image-size", 16, "--json").result[
        "times"
    ]
    assert [(row["model"], row["form"]) for row in times] == [(dense, "compile"), (str(pruned), "compile")]
