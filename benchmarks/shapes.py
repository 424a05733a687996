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

MODELS = ("resnet-50", "bert-base")
TOKENS = 128


def resnet(quick: bool) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """One image of 224 x 224."""
    small = {"embedding_size": 16, "hidden_sizes": [64, 128], "depths": [1, 1]} if quick else {}
    side = 32 if quick else 224
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return ResNetForImageClassification(ResNetConfig(**small)), {"pixel_values": pixels}


def bert(quick: bool) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """One text of 128 tokens."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
    config = BertConfig(**({**sizes, "vocab_size": 500} if quick else {}))
    ids = torch.arange(TOKENS).view(1, TOKENS) % config.vocab_size
    return BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_BUILDERS: dict[str, Callable[[bool], tuple[PreTrainedModel, dict[str, Tensor]]]] = {
    "resnet-50": resnet,
    "bert-base": bert,
}


def build(name: str, quick: bool) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model in evaluation mode and its input, the same at every call."""
    torch.manual_seed(0)
    model, inputs = _BUILDERS[name](quick)
    return model.eval(), inputs


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """A call that runs the model without gradients."""
    return torch.inference_mode()(lambda: model(**inputs))
