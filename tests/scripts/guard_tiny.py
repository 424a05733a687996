"""Play and Prune on a tiny ResNet, returning to older states: every process writes what it ends with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainingArguments

from hf_prune import PlayAndPruneConfig, PruneTrainer
from hf_prune.metrics import compute_metrics_for
from hf_prune.tiny_models import tiny_image_model


def main(folder: Path) -> None:
    images = torch.randn(48, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": images, "labels": torch.arange(48) % 3}).with_format("torch")
    trainer = PruneTrainer(
        model=tiny_image_model(),
        args=TrainingArguments(
            str(folder), max_steps=5, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no"
        ),
        train_dataset=rows.select(range(32)),
        eval_dataset=rows.select(range(32, 48)),
        pruning=PlayAndPruneConfig(max_metric_drop=0.06, iteration_steps=1, patience=0, threshold_quantile=0.3),
        compute_metrics=compute_metrics_for("accuracy"),
    )
    trainer.train()
    trajectory = torch.tensor(trainer.report.run["trajectory"])
    parameters = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    save_file({**parameters, "trajectory": trajectory}, folder / f"rank{os.environ.get('RANK', '0')}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
