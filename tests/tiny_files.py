"""Tiny models and data as files, for whatever is called with paths: the command line, examples, documents."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_prune.tiny_models import tiny_image_model, tiny_text_model

GOOD, BAD = "good great fine lovely".split(), "bad poor dull awful".split()
THINGS = "film plot cast music story".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_text_model(folder: Path, **config: object) -> str:
    """A tiny BERT classifier of two classes with a tokenizer of whole words; returns the folder."""
    words = [*SPECIAL, *GOOD, *BAD, *THINGS, "the", "is", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    tiny_text_model(**{"num_labels": 2, "pad_token_id": 0, **config}).save_pretrained(folder)
    return str(folder)


def save_image_model(folder: Path) -> str:
    """A tiny ResNet classifier of three classes with a processor to 16 x 16; returns the folder."""
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    tiny_image_model().save_pretrained(folder)
    return str(folder)


def save_reviews(path: Path, rows: int = 64) -> str:
    """A CSV of sentences with the columns text and label (good, bad); returns the path."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(rows):
            word = (GOOD, BAD)[i % 2][i // 2 % 4]
            writer.writerow([f"the {THINGS[i % 5]} is {word}", ("good", "bad")[i % 2]])
    return str(path)


def save_pictures(folder: Path, rows: int = 24) -> str:
    """A folder of a folder of images for each of three colours; returns the folder."""
    generator = np.random.default_rng(0)
    for i in range(rows):
        pixels = generator.integers(0, 60, (18, 20, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        target = folder / "train" / ("red", "green", "blue")[i % 3] / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
    return str(folder)
