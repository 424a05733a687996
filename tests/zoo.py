"""Tiny models with random weights of many transformers architectures, built without any download.

`ZOO` maps a class name to its entry; `build` gives the model in evaluation mode and an example batch of two. Weights
are sharpened: freshly initialised transformers attend uniformly, which hides wrong scales and wrong wiring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """How to build one model: `config` is the config class, `settings` its arguments, `inputs` makes a batch."""

    config: str
    settings: Mapping[str, Any]
    inputs: Callable[[Any], Inputs]
    needs: str | None = None
    """A package that is not always installed."""
    exact_dtype: torch.dtype = torch.float64
    """Models that cast to float32 in their code are compared in float32."""
    slow: bool = True


def ids(config: Any, length: int = 13) -> Inputs:
    """Two token sequences that end with the end-of-sequence token."""
    tokens = torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = getattr(config, "eos_token_id", None) or 2
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def of_length(length: int) -> Callable[[Any], Inputs]:
    return lambda config: ids(config, length)


def pixels(size: int, name: str = "pixel_values") -> Callable[[Any], Inputs]:
    return lambda _: {name: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def renamed(old: str, new: str, length: int = 13) -> Callable[[Any], Inputs]:
    return lambda config: {new if key == old else key: value for key, value in ids(config, length).items()}


def tapas(config: Any) -> Inputs:
    return {**ids(config), "token_type_ids": torch.zeros(2, 13, 7, dtype=torch.long)}


def patches(_: Any) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 16, 192, generator=generator),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def image_and_text(config: Any) -> Inputs:
    return {**ids(config), **pixels(32)(config)}


def pairs(length: int = 13) -> Callable[[Any], Inputs]:
    """What an encoder reads and what its decoder has written so far."""
    return lambda config: {**ids(config, length), "decoder_input_ids": ids(config, 7)["input_ids"]}


def spectra(bins: int, length: int, time_last: bool = False) -> Callable[[Any], Inputs]:
    shape = (2, bins, length) if time_last else (2, length, bins)
    return lambda _: {"input_features": torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def dictation(config: Any) -> Inputs:
    return {**spectra(16, 60, time_last=True)(config), "decoder_input_ids": ids(config, 5)["input_ids"]}


def image_tokens(_: Any) -> Inputs:
    return {"input_ids": torch.randint(0, 32, (2, 64), generator=torch.Generator().manual_seed(1))}


def waves(_: Any) -> Inputs:
    return {"input_values": torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))}


TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 96}
ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = ENCODER | TOKENS
VISION = ENCODER | {"image_size": 32, "patch_size": 8}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 16}
STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "image_size": 64}
WINDOWS = {"embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 3, 4], "mlp_ratios": [2, 2, 2, 2]}
LATENTS = {"num_latents": 8, "d_latents": 64, "d_model": 32, "num_self_attends_per_block": 2}
LATENTS |= {"num_self_attention_heads": 4, "num_cross_attention_heads": 1, "image_size": 32}
SMALL_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TWO_TOWERS = {"vision_config": VISION, "text_config": SMALL_TEXT | {"vocab_size": 99}}
SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
SEQ2SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 96} | TOKENS
SEQ2SEQ_LM = SEQ2SEQ | {"decoder_start_token_id": 2}
CLIP_TEXT = TEXT | {"hidden_size": 40, "intermediate_size": 56}
EXPERTS = GROUPED | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
WAVE2VEC = {"conv_dim": [16, 24], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 16}
WAVE2VEC |= {"num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32, "num_feat_extract_layers": 2} | ENCODER
PYRAMID_SWIN = WINDOWS | {"image_size": 64, "depths": [1, 1, 1, 1], "num_heads": [2, 4, 4, 4], "window_size": 2}
ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}


def image(config: str, settings: Mapping[str, Any], size: int = 32, **kwargs: Any) -> Entry:
    return Entry(config, settings, kwargs.pop("inputs", pixels(size)), **kwargs)


def text(config: str, settings: Mapping[str, Any] = TEXT, length: int = 13, **kwargs: Any) -> Entry:
    return Entry(config, settings, kwargs.pop("inputs", of_length(length)), **kwargs)


ZOO: dict[str, Entry] = {
    # image classification
    "BeitForImageClassification": image("BeitConfig", VISION | {"layer_scale_init_value": 0.1}),
    "CLIPForImageClassification": image("CLIPConfig", TWO_TOWERS),
    "ConvNextForImageClassification": image("ConvNextConfig", STAGES, 64, slow=False),
    "ConvNextV2ForImageClassification": image("ConvNextV2Config", STAGES, 64),
    "BitForImageClassification": image(
        "BitConfig", RESNET | {"num_groups": 4, "layer_type": "preactivation", "width_factor": 1}, 64
    ),
    "Data2VecVisionForImageClassification": image("Data2VecVisionConfig", VISION | {"out_indices": [0, 1]}),
    "DeiTForImageClassification": image("DeiTConfig", VISION),
    "DeiTForImageClassificationWithTeacher": image("DeiTConfig", VISION),
    "Dinov2ForImageClassification": image("Dinov2Config", VISION),
    "Dinov2WithRegistersForImageClassification": image("Dinov2WithRegistersConfig", VISION),
    "DonutSwinForImageClassification": image("DonutSwinConfig", WINDOWS),
    "EfficientNetForImageClassification": image(
        "EfficientNetConfig",
        {
            "image_size": 64,
            "hidden_dim": 1280,
            "in_channels": [32, 16, 24, 32],
            "out_channels": [16, 24, 32, 48],
            "kernel_sizes": [3, 3, 5, 3],
            "strides": [1, 2, 2, 2],
            "num_block_repeats": [1, 2, 2, 1],
            "expand_ratios": [1, 4, 4, 4],
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "depthwise_padding": [],
        },
        64,
    ),
    "FocalNetForImageClassification": image(
        "FocalNetConfig", {"embed_dim": 16, "depths": [1, 2], "image_size": 32, "hidden_sizes": [16, 32]}
    ),
    "HGNetV2ForImageClassification": image(
        "HGNetV2Config",
        {
            "embedding_size": 16,
            "stem_channels": [3, 16, 24],
            "stage_in_channels": [24, 32, 64, 96],
            "stage_mid_channels": [16, 24, 32, 48],
            "stage_out_channels": [32, 64, 96, 128],
            "hidden_sizes": [32, 64, 96, 128],
            "depths": [1, 1, 1, 1],
            "stage_num_blocks": [1, 1, 2, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
        },
        64,
    ),
    "IJepaForImageClassification": image("IJepaConfig", VISION),
    "ImageGPTForImageClassification": image(
        "ImageGPTConfig",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 33},
        inputs=image_tokens,
    ),
    "LevitForImageClassification": image(
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "attention_ratio": [2, 2, 2],
            "mlp_ratio": [2, 2, 2],
        },
        64,
    ),
    "MobileNetV1ForImageClassification": image("MobileNetV1Config", {"depth_multiplier": 0.25, "image_size": 64}, 64),
    "MobileNetV2ForImageClassification": image("MobileNetV2Config", {"depth_multiplier": 0.5, "image_size": 64}, 64),
    "MobileViTForImageClassification": image(
        "MobileViTConfig",
        {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96], "image_size": 64},
        64,
    ),
    "MobileViTV2ForImageClassification": image(
        "MobileViTV2Config",
        {
            "width_multiplier": 0.5,
            "n_attn_blocks": [1, 1, 1],
            "base_attn_unit_dims": [32, 48, 64],
            "image_size": 64,
        },
        64,
    ),
    "PerceiverForImageClassificationLearned": image("PerceiverConfig", LATENTS, inputs=pixels(32, "inputs")),
    "PerceiverForImageClassificationFourier": image("PerceiverConfig", LATENTS, inputs=pixels(224, "inputs")),
    "PerceiverForImageClassificationConvProcessing": image("PerceiverConfig", LATENTS, inputs=pixels(224, "inputs")),
    "PoolFormerForImageClassification": image("PoolFormerConfig", STAGES, 64),
    "PvtForImageClassification": image("PvtConfig", PYRAMID, 64),
    "PvtV2ForImageClassification": image("PvtV2Config", PYRAMID, 64),
    "RegNetForImageClassification": image("RegNetConfig", RESNET | {"groups_width": 8}, 64),
    "ResNetForImageClassification": image("ResNetConfig", RESNET, 64, slow=False),
    "SegformerForImageClassification": image("SegformerConfig", PYRAMID, 64, slow=False),
    "SiglipForImageClassification": image("SiglipConfig", TWO_TOWERS),
    "Siglip2ForImageClassification": image(
        "Siglip2Config", TWO_TOWERS | {"vision_config": VISION | {"num_patches": 16}}, inputs=patches
    ),
    "SwiftFormerForImageClassification": image(
        "SwiftFormerConfig", {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "image_size": 64}, 64
    ),
    "SwinForImageClassification": image("SwinConfig", WINDOWS, slow=False),
    "Swinv2ForImageClassification": image("Swinv2Config", WINDOWS),
    "TimmWrapperForImageClassification": image("TimmWrapperConfig", {"architecture": "resnet18"}, 64, needs="timm"),
    "ViTForImageClassification": image("ViTConfig", VISION, slow=False),
    "ViTMSNForImageClassification": image("ViTMSNConfig", VISION),
    "HieraForImageClassification": image(
        "HieraConfig",
        {
            "embed_dim": 16,
            "image_size": [64, 64],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 8],
            "patch_stride": [4, 4],
            "masked_unit_size": [8, 8],
        },
        64,
    ),
    "MetaClip2ForImageClassification": image("MetaClip2Config", {"vision_config": VISION, "text_config": CLIP_TEXT}),
    "PPLCNetForImageClassification": image("PPLCNetConfig", {"scale": 0.5}, 64),
    "DINOv3ViTModel": image("DINOv3ViTConfig", VISION, slow=False),
    "ViTMAEForPreTraining": image(
        "ViTMAEConfig",
        VISION
        | {
            "decoder_hidden_size": 48,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 56,
        },
        inputs=lambda _: {**pixels(32)(_), "noise": torch.rand(2, 16, generator=torch.Generator().manual_seed(1))},
    ),
    "VivitForVideoClassification": image(
        "VivitConfig",
        VISION | {"num_frames": 4, "tubelet_size": [2, 8, 8]},
        inputs=lambda _: {"pixel_values": torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))},
    ),
    # other heads on images
    "SegformerForSemanticSegmentation": image("SegformerConfig", PYRAMID | {"decoder_hidden_size": 40}, 64),
    "UperNetForSemanticSegmentation": image(
        "UperNetConfig",
        {
            "backbone_config": transformers.ConvNextConfig(
                **STAGES, out_features=["stage1", "stage2", "stage3", "stage4"]
            ),
            "hidden_size": 32,
            "auxiliary_channels": 24,
            "auxiliary_in_channels": 48,
        },
        64,
    ),
    "DPTForDepthEstimation": image(
        "DPTConfig",
        VISION
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
            "is_hybrid": False,
        },
    ),
    "YolosForObjectDetection": image("YolosConfig", VISION | {"image_size": [32, 32], "num_detection_tokens": 7}),
    "DetrForObjectDetection": image(
        "DetrConfig",
        SEQ2SEQ
        | {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": transformers.ResNetConfig(**RESNET, out_features=["stage4"]),
            "num_queries": 7,
        },
        64,
    ),
    "BeitForSemanticSegmentation": image(
        "BeitConfig",
        VISION
        | {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "layer_scale_init_value": 0.1,
            "image_size": 64,
            "use_relative_position_bias": True,
        },
        64,
    ),
    "EomtForUniversalSegmentation": image(
        "EomtConfig",
        VISION | {"num_hidden_layers": 3, "num_blocks": 1, "num_queries": 7, "image_size": 64, "num_upscale_blocks": 1},
        64,
    ),
    "MaskFormerForInstanceSegmentation": image(
        "MaskFormerConfig",
        {
            "backbone_config": transformers.SwinConfig(**PYRAMID_SWIN, out_features=ALL_STAGES),
            "decoder_config": transformers.DetrConfig(**SEQ2SEQ, num_queries=7),
            "fpn_feature_size": 32,
            "mask_feature_size": 24,
        },
        64,
    ),
    "ConditionalDetrForObjectDetection": image(
        "ConditionalDetrConfig",
        SEQ2SEQ
        | {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": transformers.ResNetConfig(**RESNET, out_features=["stage4"]),
            "num_queries": 7,
        },
        64,
    ),
    "RTDetrForObjectDetection": image(
        "RTDetrConfig",
        {
            "backbone_config": transformers.RTDetrResNetConfig(
                embedding_size=16,
                hidden_sizes=[16, 24, 32, 48],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_features=["stage2", "stage3", "stage4"],
            ),
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [24, 32, 48],
            "encoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "d_model": 32,
            "num_queries": 7,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 40,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_n_points": 2,
        },
        64,
    ),
    "DepthAnythingForDepthEstimation": image(
        "DepthAnythingConfig",
        {
            "backbone_config": transformers.Dinov2Config(
                **VISION | {"num_hidden_layers": 4}, out_features=ALL_STAGES, reshape_hidden_states=False
            ),
            "patch_size": 8,
            "reassemble_hidden_size": 64,
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
            "head_hidden_size": 16,
        },
    ),
    # images and text
    "CLIPModel": Entry(
        "CLIPConfig",
        {"vision_config": VISION, "text_config": CLIP_TEXT, "projection_dim": 24},
        image_and_text,
        slow=False,
    ),
    "CLIPSegForImageSegmentation": Entry(
        "CLIPSegConfig",
        {
            "vision_config": VISION | {"num_hidden_layers": 4},
            "text_config": CLIP_TEXT,
            "projection_dim": 24,
            "extract_layers": [1, 2, 3],
            "reduce_dim": 16,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 40,
        },
        image_and_text,
    ),
    "BlipForImageTextRetrieval": Entry(
        "BlipConfig",
        {
            "vision_config": VISION,
            "text_config": TEXT | {"encoder_hidden_size": 64},
            "image_text_hidden_size": 24,
        },
        image_and_text,
    ),
    # encoders
    "AlbertForSequenceClassification": text("AlbertConfig", TEXT | {"embedding_size": 32}, slow=False),
    "BertForSequenceClassification": text("BertConfig", slow=False),
    "BigBirdForSequenceClassification": text("BigBirdConfig", TEXT | {"attention_type": "original_full"}),
    "CamembertForSequenceClassification": text("CamembertConfig"),
    "CanineForSequenceClassification": text(
        "CanineConfig",
        TEXT
        | {
            "local_transformer_stride": 8,
            "downsampling_rate": 4,
            "num_hash_buckets": 64,
            "num_hash_functions": 4,
        },
        16,
        exact_dtype=torch.float32,
    ),
    "ConvBertForSequenceClassification": text("ConvBertConfig", TEXT | {"embedding_size": 32, "head_ratio": 2}),
    "Data2VecTextForSequenceClassification": text("Data2VecTextConfig"),
    "DebertaForSequenceClassification": text(
        "DebertaConfig", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    ),
    "DebertaV2ForSequenceClassification": text(
        "DebertaV2Config",
        TEXT
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "DistilBertForSequenceClassification": text(
        "DistilBertConfig", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128} | TOKENS, slow=False
    ),
    "ElectraForSequenceClassification": text("ElectraConfig", TEXT | {"embedding_size": 32}),
    "ErnieForSequenceClassification": text("ErnieConfig"),
    "FNetForSequenceClassification": text("FNetConfig"),
    "FunnelForSequenceClassification": text(
        "FunnelConfig", {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128, "block_sizes": [1, 1]} | TOKENS, 16
    ),
    "GteForSequenceClassification": text("GteConfig"),
    "IBertForSequenceClassification": text("IBertConfig"),
    "JinaEmbeddingsV3ForSequenceClassification": text("JinaEmbeddingsV3Config"),
    "LayoutLMForSequenceClassification": text("LayoutLMConfig", TEXT | {"max_2d_position_embeddings": 32}),
    "LiltForSequenceClassification": text("LiltConfig", TEXT | {"hidden_size": 96, "channel_shrink_ratio": 4}),
    "LongformerForSequenceClassification": text("LongformerConfig", TEXT | {"attention_window": [8, 8]}, 16),
    "MarkupLMForSequenceClassification": text(
        "MarkupLMConfig",
        TEXT
        | {"max_depth": 4, "max_xpath_tag_unit_embeddings": 32, "max_xpath_subs_unit_embeddings": 32}
        | {"tag_pad_id": 30, "subs_pad_id": 30},
    ),
    "MobileBertForSequenceClassification": text(
        "MobileBertConfig",
        TEXT
        | {
            "embedding_size": 32,
            "true_hidden_size": 64,
            "intra_bottleneck_size": 64,
            "num_feedforward_networks": 2,
            "use_bottleneck": True,
            "normalization_type": "no_norm",
        },
    ),
    "ModernBertForSequenceClassification": text(
        "ModernBertConfig",
        TEXT | {"cls_token_id": 1, "sep_token_id": 2},
        exact_dtype=torch.float32,
        slow=False,
    ),
    "MPNetForSequenceClassification": text("MPNetConfig"),
    "MraForSequenceClassification": text("MraConfig", length=16, exact_dtype=torch.float32),
    "NystromformerForSequenceClassification": text(
        "NystromformerConfig", TEXT | {"num_landmarks": 4, "segment_means_seq_len": 16}, 16
    ),
    "PerceiverForSequenceClassification": text(
        "PerceiverConfig",
        LATENTS | {"num_cross_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 16},
        inputs=renamed("input_ids", "inputs", 16),
    ),
    "RemBertForSequenceClassification": text("RemBertConfig", TEXT | {"input_embedding_size": 32}),
    "RobertaForSequenceClassification": text("RobertaConfig"),
    "RobertaPreLayerNormForSequenceClassification": text("RobertaPreLayerNormConfig"),
    "RoFormerForSequenceClassification": text("RoFormerConfig", TEXT | {"embedding_size": 64}),
    "SqueezeBertForSequenceClassification": text("SqueezeBertConfig", TEXT | {"embedding_size": 64}),
    "TapasForSequenceClassification": text("TapasConfig", inputs=tapas),
    "XLMForSequenceClassification": text(
        "XLMConfig", {"n_words": 128, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "pad_index": 0}
    ),
    "XLMRobertaForSequenceClassification": text("XLMRobertaConfig"),
    "XLMRobertaXLForSequenceClassification": text("XLMRobertaXLConfig"),
    "YosoForSequenceClassification": text("YosoConfig"),
    "BertForMaskedLM": text("BertConfig"),
    "NomicBertForMaskedLM": text("NomicBertConfig"),
    "ReformerForMaskedLM": text(
        "ReformerConfig",
        {
            "attention_head_size": 16,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [4, 4],
            "axial_pos_embds_dim": [24, 40],
            "hidden_size": 64,
            "num_attention_heads": 4,
            "feed_forward_size": 96,
            "is_decoder": False,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
            "hash_seed": 0,
        }
        | TOKENS
        | {"max_position_embeddings": 16},
        16,
    ),
    "XLNetForSequenceClassification": text(
        "XLNetConfig", {"vocab_size": 128, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96}
    ),
    # decoders and encoder-decoders
    "BartForSequenceClassification": text("BartConfig", SEQ2SEQ),
    "BloomForSequenceClassification": text("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4} | TOKENS),
    "FalconForSequenceClassification": text(
        "FalconConfig", TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "GemmaForSequenceClassification": text("GemmaConfig", GROUPED),
    "GPT2ForSequenceClassification": text(
        "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96} | TOKENS, slow=False
    ),
    "GPTNeoXForSequenceClassification": text("GPTNeoXConfig"),
    "LlamaForSequenceClassification": text("LlamaConfig", GROUPED, slow=False),
    "LlamaForCausalLM": text("LlamaConfig", GROUPED),
    "MistralForSequenceClassification": text("MistralConfig", GROUPED),
    "OPTForSequenceClassification": text(
        "OPTConfig",
        {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
        | TOKENS,
    ),
    "PhiForSequenceClassification": text("PhiConfig"),
    "Phi3ForSequenceClassification": text("Phi3Config", GROUPED | {"num_key_value_heads": 4}),
    "Qwen2ForSequenceClassification": text("Qwen2Config", GROUPED),
    "Qwen3ForSequenceClassification": text("Qwen3Config", GROUPED),
    "T5ForSequenceClassification": text(
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        | TOKENS
        | {"eos_token_id": 2},
    ),
    "T5EncoderModel": text(
        "T5Config", {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4} | TOKENS
    ),
    "Gemma2ForSequenceClassification": text("Gemma2Config", GROUPED | {"sliding_window": 8}),
    "GPTNeoForSequenceClassification": text(
        "GPTNeoConfig",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        }
        | TOKENS,
    ),
    "MarianMTModel": text("MarianConfig", SEQ2SEQ_LM, inputs=pairs()),
    "T5ForConditionalGeneration": text(
        "T5Config",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        }
        | TOKENS,
        inputs=pairs(),
    ),
    "SwitchTransformersForConditionalGeneration": text(
        "SwitchTransformersConfig",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        }
        | TOKENS,
        inputs=pairs(),
    ),
    "Qwen3MoeForCausalLM": text("Qwen3MoeConfig", EXPERTS, exact_dtype=torch.float32),
    # state spaces and recurrences
    "MambaForCausalLM": text(
        "MambaConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 6},
    ),
    "RecurrentGemmaForCausalLM": text(
        "RecurrentGemmaConfig",
        GROUPED | {"num_key_value_heads": 1, "lru_width": 48, "num_hidden_layers": 3, "attention_window_size": 16},
    ),
    "RwkvForCausalLM": text(
        "RwkvConfig",
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "attention_hidden_size": 40,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "context_length": 32,
        },
    ),
    # speech
    "Wav2Vec2ForSequenceClassification": text(
        "Wav2Vec2Config",
        WAVE2VEC,
        inputs=waves,
    ),
    "SEWForSequenceClassification": text("SEWConfig", WAVE2VEC | {"squeeze_factor": 2}, inputs=waves),
    "Wav2Vec2BertForSequenceClassification": text(
        "Wav2Vec2BertConfig",
        ENCODER
        | {
            "feature_projection_input_dim": 24,
            "conv_depthwise_kernel_size": 5,
            "left_max_position_embeddings": 4,
            "right_max_position_embeddings": 4,
        },
        inputs=spectra(24, 19),
    ),
    "WhisperForConditionalGeneration": text(
        "WhisperConfig",
        SEQ2SEQ_LM | {"num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 20},
        inputs=dictation,
        slow=False,
    ),
    "ASTForAudioClassification": text(
        "ASTConfig",
        ENCODER | {"patch_size": 8, "max_length": 32, "num_mel_bins": 16},
        inputs=lambda _: {"input_values": torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(1))},
    ),
}


def build(name: str, dtype: torch.dtype | None = None) -> tuple[nn.Module, Inputs]:
    """The model called `name`, sharpened, and its example batch, both in `dtype` (its exactness dtype by default)."""
    entry = ZOO[name]
    if entry.needs:
        pytest.importorskip(entry.needs, reason=f"{name} needs {entry.needs}")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, entry.config)(**entry.settings, num_labels=10)
    dtype = dtype or entry.exact_dtype
    model = getattr(transformers, name)(config).eval().to(dtype)
    sharpen(model)
    inputs = entry.inputs(config)
    return model, {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


@torch.no_grad()
def sharpen(model: nn.Module, factor: float = 6.0) -> None:
    """Matrices times `factor`, vectors (biases, norm weights) with noise added, running statistics moved.

    Tables that code makes anew when a checkpoint is loaded stay as they are.
    """
    generator = torch.Generator().manual_seed(5)
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if name in ignored:
            continue
        if parameter.ndim > 1:
            parameter.mul_(factor)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
