"""`hf-prune train`: any data, the same model as the same calls in Python, and runs that can be stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict, load_dataset
from launching import on_cpu, two_processes
from safetensors.torch import load_file
from tiny_cli import cli
from tiny_files import save_image_model, save_pictures, save_reviews, save_text_model
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_prune import DistillConfig, MovementConfig, PruneTrainer
from hf_prune.cli.data import Source, as_model_counts, load_labelled
from hf_prune.report.reading import read_report

QUICK = "--use-cpu --learning-rate 1e-2 --disable-tqdm true --eval-strategy no --save-strategy no".split()
MOVEMENT = "--method movement --final-sparsity 0.5".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "text": save_text_model(folder / "text"),
        "image": save_image_model(folder / "image"),
        "reviews": save_reviews(folder / "reviews.csv"),
        "pictures": save_pictures(folder / "pictures"),
    }


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_csv_of_sentences_and_one_command(files: dict[str, str], tmp_path: Path) -> None:
    words = ["train", "text", "-m", files["text"], "-d", files["reviews"], "-o", tmp_path / "out", *MOVEMENT, *QUICK]
    result = cli(*words, "--num-train-epochs", 12, "--json").result
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result["eval_accuracy"] > 0.9
    tell = pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    assert [each["label"] for each in tell(["the film is lovely", "the plot is awful"])] == ["good", "bad"]


def test_the_command_does_what_python_does(files: dict[str, str], tmp_path: Path) -> None:
    """Every option in its place: the same bits as a script with the same settings."""
    own = "--score-lr 0.05 --teacher self --distill-temperature 3 --max-steps 8 --seed 3 --warmup-steps 0.25".split()
    words = ["train", "text", "-m", files["text"], "-d", files["reviews"], "-o", tmp_path / "cli"]
    assert cli(*words, *MOVEMENT, *QUICK, *own).code == 0

    data = load_labelled(Source(files["reviews"]), ()).splits
    tokenizer = AutoTokenizer.from_pretrained(files["text"])
    data = data.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)
    set_seed(3)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    arguments = TrainingArguments(
        str(tmp_path / "python"), use_cpu=True, learning_rate=1e-2, max_steps=8, seed=3, warmup_steps=0.25,
        per_device_train_batch_size=16, weight_decay=0.01, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = PruneTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(files["text"], **names),
        args=arguments,
        train_dataset=data["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        pruning=MovementConfig(final_sparsity=0.5, score_lr=0.05, seed=3),
        teacher="self",
        distillation=DistillConfig(temperature=3.0),
    )
    trainer.train()
    trainer.save_model()
    _assert_same(_weights(tmp_path / "cli"), _weights(tmp_path / "python"))


def test_a_folder_of_images(files: dict[str, str], tmp_path: Path) -> None:
    words = ["train", "image", "-m", files["image"], "-d", files["pictures"], "-o", tmp_path / "out", *QUICK]
    result = cli(*words, "--method", "magnitude", "--target-flops", 0.6, "--max-steps", 4, "--json").result
    assert result["method"] == "magnitude" and 0 < result["sparsity"] < 1
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_without_a_method_it_fine_tunes_what_can_then_teach(files: dict[str, str], tmp_path: Path) -> None:
    words = ["train", "text", "-m", files["text"], "-d", files["reviews"], *QUICK, "--max-steps", 2]
    assert cli(*words, "-o", tmp_path / "dense").code == 0
    assert not (tmp_path / "dense" / "pruning.json").exists()
    assert cli(*words, "-o", tmp_path / "out", *MOVEMENT, "--teacher", tmp_path / "dense").code == 0


def test_a_config_file_and_an_option_that_wins(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(MovementConfig(final_sparsity=0.5, score_lr=0.5, seed=7).to_json())
    words = ["train", "text", "-m", files["text"], "-d", files["reviews"], "-o", tmp_path / "out", *QUICK]
    own = ["--config", tmp_path / "config.json", "--final-sparsity", 0.25, "--max-steps", 4, "--json"]
    assert cli(*words, *own).result["sparsity"] == pytest.approx(0.25, abs=0.01)
    used = read_report(tmp_path / "out").config
    assert used == MovementConfig(final_sparsity=0.25, score_lr=0.5, seed=7).to_dict()
    assert cli(*words, *own, "--overwrite", "--seed", 3).code == 0
    assert read_report(tmp_path / "out").config["seed"] == 3


def test_a_new_head_for_other_classes(files: dict[str, str], tmp_path: Path) -> None:
    model = save_text_model(tmp_path / "five", num_labels=5)
    done = cli("train", "text", "-m", model, "-d", files["reviews"], "-o", tmp_path / "o", *QUICK, "--max-steps", 1)
    assert done.code == 0 and "its head starts anew" in done.err


def _as_tsv(rows: DatasetDict, folder: Path) -> str:
    rows["train"].to_csv(folder / "rows.tsv", sep="\t", index=False)
    return str(folder / "rows.tsv")


def _as_json(rows: DatasetDict, folder: Path) -> str:
    rows["train"].to_json(folder / "rows.jsonl")
    return str(folder / "rows.jsonl")


def _as_parquet(rows: DatasetDict, folder: Path) -> str:
    rows["train"].to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def _as_saved(rows: DatasetDict, folder: Path) -> str:
    rows.save_to_disk(folder / "saved")
    return str(folder / "saved")


def _as_folder(rows: DatasetDict, folder: Path) -> str:
    for split in ("train", "validation", "test"):
        rows["train"].to_csv(folder / f"{split}.csv", index=False)
    return str(folder)


@pytest.mark.parametrize("store", [_as_tsv, _as_json, _as_parquet, _as_saved, _as_folder])
def test_rows_from_every_kind_of_file(store: Any, files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = load_dataset("csv", data_files=files["reviews"])
    data = load_labelled(Source(store(rows, folder)), ())
    assert data.names == ["bad", "good"]
    assert {"train", "validation"} <= set(data.splits)
    row = data.splits["train"][0]
    assert ("is " in row["text"]) and row["labels"] in (0, 1)
    assert ("test" in data.splits) == (store is _as_folder)


def test_labels_are_numbered_the_same_in_every_split(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,10\nb,9\nc,2\nd,10\n")
    (tmp_path / "eval.csv").write_text("text,label\ne,9\nf,9\n")
    data = load_labelled(Source(str(tmp_path / "train.csv"), eval_data=str(tmp_path / "eval.csv")), ())
    assert data.names == ["2", "9", "10"]
    assert data.splits["validation"]["labels"] == [1, 1] and data.splits["train"]["labels"] == [2, 1, 0, 2]


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_ends_as_if_nothing_had_happened(files: dict[str, str], tmp_path: Path) -> None:
    own = "--method movement --final-sparsity 0.5 --max-steps 120 --eval-strategy no --save-strategy no".split()
    words = ["train", "text", "-m", files["text"], "-d", files["reviews"], *own, "--use-cpu", "--logging-steps", "5"]
    command = [sys.executable, "-m", "hf_prune", *words, "-o", str(tmp_path / "stopped")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "'loss'" in line:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "To go on from there:" in rest and "--resume" in rest and "Traceback" not in rest
    assert not (tmp_path / "stopped" / "pruning.json").exists()
    assert cli(*words, "-o", tmp_path / "stopped").code == 1, "a run that exists is not replaced by accident"
    assert cli(*words, "-o", tmp_path / "stopped", "--resume").code == 0
    assert cli(*words, "-o", tmp_path / "whole").code == 0
    _assert_same(_weights(tmp_path / "stopped"), _weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.distributed
def test_ctrl_c_stops_two_processes_together(files: dict[str, str], tmp_path: Path) -> None:
    """A terminal sends it to the launcher and to both processes."""
    own = "--method movement --final-sparsity 0.5 --max-steps 400 --logging-steps 5 --save-strategy no".split()
    words = ["train", "text", "-m", files["text"], "-d", files["reviews"], *own, *QUICK, "-o", str(tmp_path / "two")]
    # Without a session of its own the test would stop, too.
    launched = {"start_new_session": True, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(two_processes("-m", "hf_prune", *words), env=on_cpu(), **launched) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "'loss'" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode != 0
    assert rest.count("To go on from there:") == 1 and "accelerate launch -m hf_prune train text" in rest, rest
    stopped = {path.name for path in (tmp_path / "two").glob("checkpoint-*")}
    assert len(stopped) == 1
    again = two_processes("-m", "hf_prune", *words, "--resume")
    done = subprocess.run(again, env=on_cpu(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "pruning.json").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_one_model(files: dict[str, str], tmp_path: Path) -> None:
    """`accelerate launch -m hf_prune`: the masks of one process with twice the batch, and one result printed."""
    own = "--method movement --final-sparsity 0.5 --max-steps 6 --logging-steps 1 --dataloader-drop-last true".split()
    words = ["train", "text", "-m", files["text"], "-d", files["reviews"], *own, *QUICK, "--json"]
    command = two_processes("-m", "hf_prune", *words, "-o", str(tmp_path / "two"), "--per-device-train-batch-size", "4")
    done = subprocess.run(command, env=on_cpu(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert cli(*words, "-o", tmp_path / "one", "--per-device-train-batch-size", 8).code == 0
    two, one = _weights(tmp_path / "two"), _weights(tmp_path / "one")
    assert two.keys() == one.keys()
    for name, value in two.items():
        if not name.endswith(("_gaps", "_bitmask")):
            assert value.shape == one[name].shape and (value - one[name]).abs().max() <= 1e-4, name


def test_a_trained_model_reads_the_classes_in_its_own_order(files: dict[str, str]) -> None:
    data = load_labelled(Source(files["reviews"]), ())
    config = AutoConfig.from_pretrained(files["text"], id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    turned = as_model_counts(data, config)
    assert turned.names == ["good", "bad"] and data.names == ["bad", "good"]
    assert turned.splits["train"]["labels"] == [1 - label for label in data.splits["train"]["labels"]]
    assert turned.splits["train"]["text"] == data.splits["train"]["text"]
    unnamed = AutoConfig.from_pretrained(files["text"])
    assert as_model_counts(data, unnamed) is data
