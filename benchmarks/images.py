"""Labelled images as tensors, decoded once for all cells of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments


class Pixels(Dataset):
    """Images as one tensor. A batch is one indexing of it, and half of the training images are mirrored."""

    def __init__(self, images: Tensor, labels: Tensor, mirrored: bool) -> None:
        """images: bytes, `(N, C, H, W)`."""
        self.images, self.labels, self.mirrored = (images.float() / 255 - 0.5) / 0.25, labels, mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        images = self.images[rows]
        if self.mirrored:
            images = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, images.flip(-1), images)
        return {"pixel_values": images, "labels": self.labels[rows]}


def whole(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collator of a data set that gives batches."""
    return batch


def read(path: Path) -> dict[str, Pixels]:
    """The splits that `decode` wrote."""
    tensors = torch.load(path, weights_only=True)
    return {split: Pixels(**each, mirrored=split == "train") for split, each in tensors.items()}


def training_arguments(folder: Path, **more: Any) -> TrainingArguments:
    """Decayed weights under a cosine, one process, nothing saved or reported; `more` adds to that, or changes it."""
    common: dict[str, Any] = {
        "per_device_eval_batch_size": 250,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,  # pulls are added after clipping, which would weaken the task against them
        "save_strategy": "no",
        "logging_steps": 100,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**common, **more})


def decode(load: Callable[..., Any], rows: int, path: Path) -> None:
    """Write the splits that `load` gives, with `rows` rows to train on, as tensors, unless they are there."""
    if path.exists():
        return
    tensors = {
        split: {
            "images": torch.from_numpy(np.stack([_channels_first(image) for image in each["image"]])),
            "labels": torch.tensor(each["label"]),
        }
        for split, each in load(limit=rows).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    torch.save(tensors, fresh)
    fresh.replace(path)


def _channels_first(image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
