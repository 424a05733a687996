"""What `train` does for texts and for images: which data suits, the model's class, and rows turned into inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from hf_prune.cli.data import Labelled, Source, as_model_counts, input_columns, is_image, is_text, load_labelled
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


@dataclass(frozen=True)
class Task:
    """One kind of input: the model's class, the built-in data that suits it, and how rows become inputs."""

    auto: Any
    demos: tuple[str, ...]
    processing: Callable[[str, PreTrainedModel, Reading], Any]
    """Name, model and reading -> the tokenizer or image processor."""
    encode: Callable[[DatasetDict, Any, PreTrainedModel, Reading], DatasetDict]
    """Splits of labelled rows -> splits of inputs."""
    collator: Callable[[Any], Callable[[Any], Any]]
    lazy: bool
    """Rows become inputs only when they are read."""

    def prepare(self, name: str, data: Labelled, reading: Reading, model: PreTrainedModel | None = None) -> Prepared:
        """The model `name` for the classes of `data`, unless it is given, and the rows as its inputs."""
        model = model or load_classifier(self.auto, name, data.label_names)
        processing = self.processing(name, model, reading)
        splits = self.encode(data.splits, processing, model, reading)
        return Prepared(model, processing, splits, self.collator(processing))


def task_of(model: PreTrainedModel) -> Task:
    """The task of a classifier, by what it reads.

    Raises:
        PruneError: it reads neither token ids nor images.
    """
    tasks = {"input_ids": "text", "pixel_values": "image"}
    if model.main_input_name not in tasks or "Classification" not in type(model).__name__:
        raise PruneError(
            f"labelled rows suit classifiers of texts or images, and the model is a {type(model).__name__}."
        )
    return TASKS[tasks[model.main_input_name]]


def batches_for(name: str, model: PreTrainedModel, source: Source, reading: Reading, size: int = 32) -> DataLoader:
    """Labelled training rows of `source` as inputs of the loaded `model`, in a fixed order.

    name: where the model was loaded from, for the tokenizer or image processor beside it.
    """
    task = task_of(model)
    data = as_model_counts(load_labelled(source, task.demos), model.config)
    prepared = task.prepare(name, data, reading, model)
    return DataLoader(prepared.splits["train"], batch_size=size, collate_fn=prepared.collator)


def _tokenizer(name: str, model: PreTrainedModel, reading: Reading) -> Any:
    tokenizer = load_tokenizer(name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _tokens(splits: DatasetDict, tokenizer: Any, model: PreTrainedModel, reading: Reading) -> DatasetDict:
    columns = splits["train"].column_names
    read = input_columns(splits["train"], reading.columns, TEXT_COLUMNS, is_text)
    return splits.map(
        lambda batch: tokenizer(*(batch[each] for each in read), truncation=True, max_length=reading.max_length),
        batched=True,
        remove_columns=[each for each in columns if each != "labels"],
    )


def _channels(model: PreTrainedModel) -> int:
    return getattr(model.config, "num_channels", 3)


def _image_processor(name: str, model: PreTrainedModel, reading: Reading) -> Any:
    return load_image_processor(name, reading.image_size, _channels(model))


def _pixels(splits: DatasetDict, processor: Any, model: PreTrainedModel, reading: Reading) -> DatasetDict:
    read, *others = input_columns(splits["train"], reading.columns, (("image",), ("img",)), is_image)
    if others:
        raise PruneError(f"an image classifier reads one column, got --input-column {read} and {', '.join(others)}.")
    mode = "L" if _channels(model) == 1 else "RGB"

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        images = [image.convert(mode) for image in batch[read]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    return splits.with_transform(transform)


def _stacked(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as one batch: `pixel_values` (batch, C, H, W) and `labels` (batch,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


TASKS = {
    "text": Task(
        AutoModelForSequenceClassification,
        ("movie_sentiment", "bbc_news", "sense_pairs", "snippets"),
        _tokenizer,
        _tokens,
        DataCollatorWithPadding,
        lazy=False,
    ),
    "image": Task(
        AutoModelForImageClassification,
        ("fashion_mnist", "emoji"),
        _image_processor,
        _pixels,
        lambda processor: _stacked,
        lazy=True,
    ),
}
