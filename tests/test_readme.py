"""README.md: its tables are what the program says, its commands and programs run as they stand, on tiny models."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from hub_server import HubServer
from tiny_cli import cli
from tiny_files import save_image_model, save_pictures, save_reviews, save_text_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import hf_prune
from hf_prune import MagnitudeConfig, MovementConfig, Report

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
QUICK = "--use-cpu --max-steps 3 --disable-tqdm true --save-strategy no".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_tables_are_what_the_program_says() -> None:
    program = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert program["generate"](TEXT) == TEXT, "README.md is behind: make docs"
    assert TEXT.count("<!-- generated: ") == len(program["TABLES"])


def commands() -> Iterator[list[str]]:
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that README.md speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hub_server.USER", "me")
    save_reviews(tmp_path / "reviews.csv")
    save_pictures(tmp_path / "pictures")
    save_text_model(tmp_path / "tiny-text")
    save_image_model(tmp_path / "tiny-image")
    return tmp_path


@pytest.mark.slow
def test_commands_run_in_their_order(here: Path, hub: HubServer) -> None:
    tiny = {"demo:minilm": "tiny-text", "microsoft/resnet-18": "tiny-image"}
    run = []
    for program, *words in commands():
        if program != "hf-prune":
            continue
        length = ["--length", "8"] if words[0] == "bench" else []
        more = QUICK if words[0] == "train" else length
        done = cli(*(tiny.get(word, word) for word in words), *more)
        assert done.code == 0, f"{words}: {done.err}"
        run.append(words[0])
    assert run == ["doctor", *["train"] * 3, "prune", "train", "inspect", "inspect", "report", "bench", "push"]
    assert "model.safetensors" in hub.files("me/pruned-reviews")


def test_other_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    others = [words for words in commands() if words[0] != "hf-prune"]
    targets = [words[1] for words in others if words[0] == "make"]
    assert targets == ["demo", "test"] and all(f"\n{target}:" in makefile for target in targets)
    assert [words[:3] for words in others if words[0] == "pip"] == [["pip", "install", ".[plots]"]]


def names(folder: Path) -> dict[str, Any]:
    """What README.md's programs take for granted."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "tiny-text")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny-text")
    rows = load_dataset("csv", data_files=str(folder / "reviews.csv"), split="train")
    rows = rows.map(
        lambda row: {**tokenizer(row["text"], padding="max_length", max_length=8), "labels": row["label"] == "good"}
    )
    rows = rows.cast_column("labels", rows.features["input_ids"].feature).remove_columns(["text", "label"])
    batch = {name: torch.tensor(rows[:4][name]) for name in ("input_ids", "attention_mask", "labels")}
    example = {name: value for name, value in batch.items() if name != "labels"}
    return {
        "hf_prune": hf_prune,
        "torch": torch,
        "model": model,
        "teacher": AutoModelForSequenceClassification.from_pretrained(folder / "tiny-text"),
        "tokenizer": tokenizer,
        "args": TrainingArguments("run", use_cpu=True, max_steps=3, save_strategy="no", disable_tqdm=True),
        "train": rows,
        "val": rows,
        "batch": example,
        "batches": [batch] * 5,
        "total_steps": 5,
        "config": MovementConfig(final_sparsity=0.5),
        "report": hf_prune.prune(model, MagnitudeConfig(final_sparsity=0.1))[1],
    }


def test_programs_run(here: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = blocks("python")
    assert len(programs) == 5
    for program in programs:
        space = names(here)
        exec(compile(program, "README.md", "exec"), space)
        if "report" in program:
            assert isinstance(space["report"], Report)
    assert sum(path.name == "pruning.json" for path in here.glob("out/*")) == 1
    assert "model.safetensors" in hub.files("me/pruned-reviews")
    assert "hf_prune" in sys.modules
