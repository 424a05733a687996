"""ResNet-50 and BERT-base with random weights, and one input: speed depends on shapes, not on what was learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

TOKENS = 128


def image(quick: bool) -> dict[str, Tensor]:
    """One image of 224 x 224."""
    side = 64 if quick else 224
    return {"pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))}


def text(quick: bool) -> dict[str, Tensor]:
    """One text of 128 tokens."""
    ids = torch.arange(TOKENS).view(1, TOKENS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def resnet(quick: bool) -> PreTrainedModel:
    small = {"embedding_size": 16, "hidden_sizes": [64, 128], "depths": [1, 1]} if quick else {}
    return ResNetForImageClassification(ResNetConfig(**small))


def bert(quick: bool) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**({**sizes, "vocab_size": 500} if quick else {})))


_MODELS: dict[str, Callable[[bool], PreTrainedModel]] = {"resnet-50": resnet, "bert-base": bert}
INPUTS: dict[str, Callable[[bool], dict[str, Tensor]]] = {"resnet-50": image, "bert-base": text}


def build(name: str, quick: bool) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model in evaluation mode and its input, the same at every call."""
    torch.manual_seed(0)
    return _MODELS[name](quick).eval(), INPUTS[name](quick)


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """A call that runs the model without gradients."""
    return torch.inference_mode()(lambda: model(**inputs))
