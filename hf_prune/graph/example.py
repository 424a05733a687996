"""An example batch for models of known modality, so that tracing needs nothing from the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.types import PruneError

LENGTH = 13
"""Tokens in an example: an odd number, so that it is taken for no other size."""


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two samples of the kind that `model.main_input_name` says: token ids or images, in sizes from the config."""
    name = getattr(model, "main_input_name", None)
    if name not in _BUILDERS or not hasattr(model, "config"):
        raise PruneError(
            f"{type(model).__name__} takes {name or 'inputs'!r}, and no example of that can be made from its config. "
            "Pass example_inputs, a dict of tensors that model(**example_inputs) accepts."
        )
    return _BUILDERS[name](model.config)


def _tokens(config: Any) -> dict[str, Tensor]:
    text = config.get_text_config()
    ids = (torch.arange(2 * LENGTH).view(2, LENGTH) * 7 + 5) % text.vocab_size
    if isinstance(text.eos_token_id, int):
        ids[:, -1] = text.eos_token_id  # models that read the sentence there count its places
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(config: Any) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    shape = (2, getattr(vision, "num_channels", 3), height, width)
    return {"pixel_values": torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)}


_BUILDERS: dict[str | None, Callable[[Any], dict[str, Tensor]]] = {"input_ids": _tokens, "pixel_values": _pixels}
