"""Models whose layers can carry gates on their output channels, of each kind that `parts.channel_gates` treats."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from hf_prune.tiny_models import tiny_image_model, tiny_text_model

IMAGES = {"pixel_values": torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0))}


class Plain(nn.Module):
    """Convolutions with and without bias and norm, a norm without scale, and a flattening reader."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(),
            nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12, affine=False), nn.ReLU(),
            nn.Conv2d(12, 10, 3, bias=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(10 * 11 * 11, 14), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(14, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values))


def _mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, num_labels=3, tf_padding=False))


MODELS: dict[str, tuple[Callable[[], nn.Module], bool, int]] = {
    "plain": (Plain, False, 4),
    "basic": (lambda: tiny_image_model(depths=[2, 2]), False, 4),
    "bottleneck": (lambda: tiny_image_model(layer_type="bottleneck", hidden_sizes=[16, 32]), False, 4),
    "residual": (lambda: tiny_image_model(depths=[2, 2]), True, 6),
    "depthwise": (_mobilenet, False, 16),
    "text": (tiny_text_model, False, 2),
}
"""Model, whether its residual streams are gated too, and how many widths carry a gate at least."""


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of that model."""
    if name == "text":
        return {"input_ids": torch.randint(0, 40, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    images = torch.randn(2, 3, 33, 33) if name == "depthwise" else IMAGES["pixel_values"]
    return {"pixel_values": images.to(dtype)}


def scramble(model: nn.Module) -> nn.Module:
    """Norms with statistics, scales and offsets as training leaves them; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.5)
    return model.eval()


@torch.no_grad()
def answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model says, as one tensor."""
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits
