"""Tiny transformers models with weights from fixed seeds, and batches that they take, for tests and the doctor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def tiny_text_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A BERT classifier of two small layers, in float32 and without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**{**sizes, **more, **dropout, **config}))


def tiny_image_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A ResNet classifier of two small stages."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    sizes = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**{**sizes, "layer_type": "basic", **config}))


def tiny_deep_model(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A ViT classifier of four layers, in float32 and without dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(
        ViTConfig(**{**sizes, **dropout, "intermediate_size": 24, "num_labels": 3, **config})
    )


TINY_MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "text": tiny_text_model,
    "image": tiny_image_model,
    "deep": tiny_deep_model,
}
"""What a method's `TINY_MODEL` may name."""


def tiny_batch(model: Any, size: int, seed: int) -> dict[str, Tensor]:
    """`size` rows of labelled inputs that a tiny model takes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(0, model.config.num_labels, (size,), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator), "labels": labels}
    ids = torch.randint(0, model.config.vocab_size, (size, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
