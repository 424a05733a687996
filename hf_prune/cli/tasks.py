"""What `train` does for texts and for images: which data suits, the model's class, and rows turned into inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from hf_prune.cli.data import Labelled, input_columns, is_image, is_text
from hf_prune.cli.models import load_classifier, load_image_processor, load_tokenizer
from hf_prune.types import PruneError

TEXT_COLUMNS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text",), ("sentence",),
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What a `Trainer` needs for one task."""

    model: PreTrainedModel
    processing_class: Any
    splits: Any
    collator: Callable[[Any], Any]


@dataclass(frozen=True)
class Reading:
    """How rows are read; None and empty for what data and model suggest."""

    columns: tuple[str, ...] = ()
    max_length: int = 128
    image_size: int | None = None


def prepare_text(name: str, data: Labelled, reading: Reading) -> Prepared:
    """A sequence classifier and tokenized rows, of one text or a pair."""
    tokenizer = load_tokenizer(name)
    model = load_classifier(AutoModelForSequenceClassification, name, data.label_names)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    read = input_columns(data.splits["train"], reading.columns, TEXT_COLUMNS, is_text)
    splits = data.splits.map(
        lambda batch: tokenizer(*(batch[each] for each in read), truncation=True, max_length=reading.max_length),
        batched=True,
        remove_columns=[each for each in data.splits["train"].column_names if each != "labels"],
    )
    return Prepared(model, tokenizer, splits, DataCollatorWithPadding(tokenizer))


def prepare_image(name: str, data: Labelled, reading: Reading) -> Prepared:
    """An image classifier, and rows whose images are processed when they are read."""
    model = load_classifier(AutoModelForImageClassification, name, data.label_names)
    channels = getattr(model.config, "num_channels", 3)
    processor = load_image_processor(name, reading.image_size, channels)
    read, *others = input_columns(data.splits["train"], reading.columns, (("image",), ("img",)), is_image)
    if others:
        raise PruneError(f"an image classifier reads one column, got --input-column {read} and {', '.join(others)}.")
    mode = "L" if channels == 1 else "RGB"

    def pixels(batch: dict[str, Any]) -> dict[str, Any]:
        images = [image.convert(mode) for image in batch[read]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    return Prepared(model, processor, data.splits.with_transform(pixels), _stacked)


def _stacked(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as one batch: `pixel_values` (batch, C, H, W) and `labels` (batch,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@dataclass(frozen=True)
class Task:
    """What prepares it, the built-in data that suits it, and whether rows become inputs only when they are read."""

    prepare: Callable[[str, Labelled, Reading], Prepared]
    demos: tuple[str, ...]
    reads_lazily: bool


TASKS = {
    "text": Task(prepare_text, ("movie_sentiment", "bbc_news", "sense_pairs", "snippets"), reads_lazily=False),
    "image": Task(prepare_image, ("fashion_mnist", "emoji"), reads_lazily=True),
}
