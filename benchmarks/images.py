"""Labelled images as tensors, decoded once for all cells of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments


class Pixels(Dataset):
    """Images as one tensor. A batch is one indexing of it, and half of the training images are mirrored."""

    def __init__(self, images: Tensor, labels: Tensor, mirrored: bool, shift: int = 0) -> None:
        """images: bytes, `(N, C, H, W)`.  shift: pixels by which images move at most, to each side."""
        self.images, self.labels, self.mirrored = (images.float() / 255 - 0.5) / 0.25, labels, mirrored
        self.shift = shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        images = self.images[rows]
        if self.mirrored:
            images = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, images.flip(-1), images)
        if self.shift:
            images = _shifted(images, self.shift)
        return {"pixel_values": images, "labels": self.labels[rows]}


def _shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` pixels; what comes in is black."""
    count, _, height, width = images.shape
    padded = F.pad(images, [most] * 4, value=-2.0).movedim(1, 3)
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1)).unbind()
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def whole(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collator of a data set that gives batches."""
    return batch


def read(path: Path, shift: int = 0) -> dict[str, Pixels]:
    """The splits that `decode` wrote; training images are mirrored, and moved by up to `shift` pixels."""
    evaluated = torch.load(path, weights_only=True)
    trained = Pixels(**evaluated.pop("train"), mirrored=True, shift=shift)
    return {"train": trained, **{split: Pixels(**each, mirrored=False) for split, each in evaluated.items()}}


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
