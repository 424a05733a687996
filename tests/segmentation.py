"""A tiny Segformer and images to segment, by the sign of the mean over the channels."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation


def tiny_segmentation_model() -> SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
    more = {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [4, 4]}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **more, decoder_hidden_size=16, num_labels=3))


def segmentation_rows(count: int) -> Dataset:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"pixel_values": images, "labels": (images.mean(1) > 0).long()}).with_format("torch")
