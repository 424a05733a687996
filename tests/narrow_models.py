"""Tiny models with narrow layers, the same shape changes that pruning heads, FFN units and channels makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_prune.graph.resize import resize
from hf_prune.types import ShapeTable

TEXT = {"input_ids": torch.arange(12).view(2, 6)}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
HIDDEN, FFN, HEADS_OUT = 32, 40, 24

Names = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Names:
    """Shapes of a Linear with bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, size: int) -> Names:
    """Shapes of a BatchNorm."""
    return {f"{name}.{leaf}": (size,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def bert() -> tuple[PreTrainedModel, ShapeTable]:
    """Three of four heads, 40 of 64 FFN units in the first of two layers."""
    config = BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        num_labels=3,
    )
    layer = "bert.encoder.layer.0."
    heads = linear(f"{layer}attention.self.query", HEADS_OUT, HIDDEN) | linear(
        f"{layer}attention.self.key", HEADS_OUT, HIDDEN
    )
    heads |= linear(f"{layer}attention.self.value", HEADS_OUT, HIDDEN)
    heads |= {f"{layer}attention.output.dense.weight": (HIDDEN, HEADS_OUT)}
    ffn = linear(f"{layer}intermediate.dense", FFN, HIDDEN) | {f"{layer}output.dense.weight": (HIDDEN, FFN)}
    sizes = {f"{layer}attention.self": {"num_attention_heads": 3, "all_head_size": HEADS_OUT}}
    return BertForSequenceClassification(config), ShapeTable(heads | ffn, sizes)


def distilbert() -> tuple[PreTrainedModel, ShapeTable]:
    """Three of four heads, 40 of 64 FFN units."""
    config = DistilBertConfig(
        dim=HIDDEN, n_layers=1, n_heads=4, hidden_dim=64, vocab_size=100, max_position_embeddings=32
    )
    layer = "distilbert.transformer.layer.0."
    shapes: Names = {}
    for name in ("q_lin", "k_lin", "v_lin"):
        shapes |= linear(f"{layer}attention.{name}", HEADS_OUT, HIDDEN)
    shapes |= {f"{layer}attention.out_lin.weight": (HIDDEN, HEADS_OUT), f"{layer}ffn.lin2.weight": (HIDDEN, FFN)}
    return DistilBertForSequenceClassification(config), ShapeTable(shapes | linear(f"{layer}ffn.lin1", FFN, HIDDEN))


def vit() -> tuple[PreTrainedModel, ShapeTable]:
    """Three of four heads, 40 of 64 FFN units; transformers stores this model under names other than its own."""
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
    )
    model = ViTForImageClassification(config)
    shapes: Names = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "k_proj", "v_proj", "query", "key", "value")):
            shapes |= linear(name, HEADS_OUT, HIDDEN)
        elif isinstance(module, nn.Linear) and name.endswith(("o_proj", "attention.output.dense")):
            shapes[f"{name}.weight"] = (HIDDEN, HEADS_OUT)
        elif isinstance(module, nn.Linear) and module.out_features == 64:
            shapes |= linear(name, FFN, HIDDEN)
        elif isinstance(module, nn.Linear) and module.in_features == 64:
            shapes[f"{name}.weight"] = (HIDDEN, FFN)
    return model, ShapeTable(shapes)


def resnet() -> tuple[PreTrainedModel, ShapeTable]:
    """5 of 8 and 9 of 16 channels inside the two residual blocks."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    shapes: Names = {}
    for stage, (inputs, outputs, kept) in enumerate([(8, 8, 5), (8, 16, 9)]):
        block = f"resnet.encoder.stages.{stage}.layers.0.layer."
        shapes |= {f"{block}0.convolution.weight": (kept, inputs, 3, 3)} | norm(f"{block}0.normalization", kept)
        shapes |= {f"{block}1.convolution.weight": (outputs, kept, 3, 3)}
    return ResNetForImageClassification(config), ShapeTable(shapes)


def mobilenet() -> tuple[PreTrainedModel, ShapeTable]:
    """30 of 48 channels of a depthwise block, whose groups must follow."""
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32)
    block = "mobilenet_v2.layer.0."
    shapes: Names = {f"{block}expand_1x1.convolution.weight": (30, 8, 1, 1)}
    shapes |= {
        f"{block}conv_3x3.convolution.weight": (30, 1, 3, 3),
        f"{block}reduce_1x1.convolution.weight": (8, 30, 1, 1),
    }
    shapes |= norm(f"{block}expand_1x1.normalization", 30) | norm(f"{block}conv_3x3.normalization", 30)
    return MobileNetV2ForImageClassification(config), ShapeTable(shapes)


MODELS: dict[str, tuple[Callable[[], tuple[PreTrainedModel, ShapeTable]], dict[str, Tensor]]] = {
    "bert": (bert, TEXT),
    "distilbert": (distilbert, TEXT),
    "vit": (vit, IMAGE),
    "resnet": (resnet, IMAGE),
    "mobilenet": (mobilenet, IMAGE),
}


def narrow_model(name: str, sparsity: float = 0.9) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A narrow model with random weights, `sparsity` of those with two dimensions or more zero, and inputs for it."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, table = build()
    resize(model, table)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            # Far from what an initialiser would leave, and positive, as a variance must be.
            tensor.uniform_(0.1, 1.0, generator=generator)
        if tensor.ndim >= 2:
            tensor.mul_(torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, 1.0, -1.0))
            tensor.masked_fill_(torch.rand(tensor.shape, generator=generator) < sparsity, 0.0)
    return model.eval(), inputs


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What `model` says, shape (batch, labels)."""
    with torch.no_grad():
        return model(**inputs).logits
