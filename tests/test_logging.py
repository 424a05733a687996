"""What a run reports through Trainer's own integrations, read back from their stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_prune import MagnitudeConfig, MovementConfig, PruneConfig, Pruner, PruneTrainer
from hf_prune.tiny_models import tiny_image_model, tiny_text_model

STEPS = 6


def run(folder: Path, report_to: str, pruning: PruneConfig, **options: Any) -> PruneTrainer:
    """A finished run that logs at every step."""
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=report_to, disable_tqdm=True, max_steps=STEPS, logging_steps=1,
        save_strategy="no", project="tiny", run_name="first",
    )  # fmt: skip
    ids = torch.randint(0, 40, (16, 6))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}
    trainer = PruneTrainer(
        model=tiny_text_model(), args=arguments, train_dataset=Dataset.from_dict(rows), pruning=pruning, **options
    )
    trainer.train()
    return trainer


def logged(trainer: PruneTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the integration writes."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return tmp_path / "board"


def scalars(folder: Path) -> dict[str, list[float]]:
    """Name -> values by step, from TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_sparsity_terms_and_temperature(tensorboard: Path, tmp_path: Path) -> None:
    trainer = run(tmp_path, "tensorboard", MovementConfig(final_sparsity=0.5, variant="soft"), teacher="self")
    found = scalars(tensorboard)
    for name in ("sparsity", "penalty", "penalty_weight", "distill_logits", "temperature", "loss"):
        assert found[f"train/{name}"] == pytest.approx(logged(trainer, name), rel=1e-6), name
        assert len(found[f"train/{name}"]) == STEPS
    assert found["train/temperature"] == [2.0] * STEPS
    assert "train/multiply_adds_kept" not in found  # single weights: nothing gets narrower


def test_tensorboard_has_the_multiply_adds_kept(tensorboard: Path, tmp_path: Path) -> None:
    pruning = MagnitudeConfig(target_flops=0.5, structure="group", begin=0.0, end=0.5)
    report = run(tmp_path, "tensorboard", pruning).report
    kept = scalars(tensorboard)["train/multiply_adds_kept"]
    assert len(kept) == STEPS and kept[0] > kept[-1]
    price = report.prices["multiply_adds"]
    assert kept[-1] == pytest.approx(price["kept"] / price["dense"]) and kept[-1] <= 0.5


def test_trackio_has_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when trackio is imported
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("trackio", reason="pip install 'hf-prune[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    trainer = run(tmp_path, "trackio", MovementConfig(final_sparsity=0.5, variant="soft"), teacher="self")
    logs = SQLiteStorage.get_logs("tiny", "first")
    for name in ("sparsity", "penalty", "distill_logits", "temperature", "loss"):
        found = [entry[f"train/{name}"] for entry in logs if f"train/{name}" in entry]
        assert found == pytest.approx(logged(trainer, name), rel=1e-6) and len(found) == STEPS, name


def test_multiply_adds_of_the_logs_are_those_of_the_shrunk_model() -> None:
    from hf_prune.graph import trace

    model, example = tiny_image_model(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    dense = trace(model, example).price()
    pruner = Pruner(model, MagnitudeConfig(target_flops=0.6, structure="group"), example)
    pruner.attach()
    assert pruner.logs()["multiply_adds_kept"] == 1.0
    pruner.step(1, 1)
    kept = pruner.logs()["multiply_adds_kept"]
    prices = pruner.finalize().prices
    shrunk = trace(model, example).price()
    assert kept == shrunk.multiply_adds / dense.multiply_adds < 0.6
    for name in ("multiply_adds", "parameters", "bytes"):
        assert prices[name] == {"dense": getattr(dense, name), "kept": getattr(shrunk, name)}
    assert shrunk.parameters == sum(parameter.numel() for parameter in model.parameters())
