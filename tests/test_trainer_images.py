"""PruneTrainer on image models: channels go while it trains; processor, checkpoint and further training as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import segmentation
import torch
from datasets import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from hf_prune import MagnitudeConfig, PruneTrainer
from hf_prune.checkpoint.names import renamed_on_disk
from hf_prune.graph import trace
from hf_prune.testing import aligned
from hf_prune.tiny_models import tiny_image_model

PRUNING = MagnitudeConfig(target_flops=0.5, begin=0.1, end=0.6)
IMAGES = torch.randn(32, 3, 17, 17, generator=torch.Generator().manual_seed(0))


def _rows() -> Dataset:
    return Dataset.from_dict({"pixel_values": IMAGES, "labels": torch.arange(32) % 3}).with_format("torch")


def _arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {"max_steps": 10, "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 2}
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**defaults, **settings})


def _trainer(folder: Path, **settings: Any) -> PruneTrainer:
    model = tiny_image_model(embedding_size=16, hidden_sizes=[16, 32])
    return PruneTrainer(
        model=model,
        args=_arguments(folder, **settings),
        train_dataset=_rows(),
        eval_dataset=_rows(),
        processing_class=ConvNextImageProcessorPil(size={"shortest_edge": 17}),
        pruning=PRUNING,
    )


def test_channels_go_and_the_rest_is_an_ordinary_model(tmp_path: Path) -> None:
    example = {"pixel_values": IMAGES[:2]}
    dense = trace(tiny_image_model(embedding_size=16, hidden_sizes=[16, 32]), example).price()
    trainer = _trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    model = trainer.model.eval()
    assert trace(model, example).price().multiply_adds / dense.multiply_adds == pytest.approx(0.5, abs=0.03)

    loaded = aligned(AutoModelForImageClassification.from_pretrained(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES).logits, model(IMAGES).logits)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] == 17

    Trainer(model=loaded, args=_arguments(tmp_path / "tune"), train_dataset=_rows()).train()
    loaded.save_pretrained(tmp_path / "tuned")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in loaded.state_dict().items())


def test_a_run_on_groups_resumes_exactly(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole")
    whole.train()
    broken = _trainer(tmp_path / "broken", save_strategy="steps", save_steps=4)
    broken.train()
    resumed = _trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_model_that_is_saved_under_other_names_resumes_exactly(tmp_path: Path) -> None:
    def trainer(**settings: Any) -> PruneTrainer:
        torch.manual_seed(0)
        model, args = segmentation.tiny_segmentation_model(), _arguments(tmp_path, max_steps=4, **settings)
        return PruneTrainer(model=model, args=args, train_dataset=rows, pruning=PRUNING)

    rows = segmentation.segmentation_rows(16)
    whole = trainer(save_strategy="steps", save_steps=2)
    assert renamed_on_disk(whole.model)
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
