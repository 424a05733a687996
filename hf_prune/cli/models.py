"""Models with a head for the classes of some data, from a Hub id, a folder, or the packages of the demo data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from hf_prune import demo_data
from hf_prune.checkpoint.load import is_empty, readable
from hf_prune.cli.data import DEMO
from hf_prune.config import closest
from hf_prune.types import PruneError

DEMO_MODELS: dict[str, Callable[[Path], str]] = {
    "minilm": lambda folder: demo_data.minilm_path(),
    "mobilenet_v2": lambda folder: demo_data.save_mobilenet_v2(folder),
}
"""Name -> what gives the folder of that model, writing it to the folder given where it has to."""


def model_path(name: str, scratch: Path) -> str:
    """`name`, or the folder that `demo:NAME` stands for."""
    if not name.startswith(DEMO):
        return name
    known = name.removeprefix(DEMO)
    if known not in DEMO_MODELS:
        raise PruneError(f"there is no built-in model {known!r}{closest(known, list(DEMO_MODELS))}.")
    return DEMO_MODELS[known](scratch)


def load_classifier(auto: Any, name: str, labels: dict[str, Any]) -> PreTrainedModel:
    """The model `name` as the Auto class `auto`, with a new head where it has one for other classes.

    Raises:
        PruneError: nothing loadable under that name, or a narrow checkpoint with a head for other classes.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PruneError(f"no model can be loaded from {name!r}: {str(error).splitlines()[0]}") from error
    count = len(labels["id2label"])
    replaced = any("Classification" in each for each in config.architectures or []) and config.num_labels != count
    if replaced and getattr(config, "quantization_config", None) is not None:
        raise PruneError(
            f"{name!r} is pruned for {config.num_labels} classes and the data has {count}: a pruned checkpoint cannot "
            "get another head while it loads. Prune a model that was trained for these classes."
        )
    if replaced:
        typer.echo(f"{name} has {config.num_labels} classes, the data {count}: its head starts anew.", file=sys.stderr)
    try:
        with readable(name):
            return auto.from_pretrained(name, **labels, ignore_mismatched_sizes=replaced)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise PruneError(f"{name!r} is a {config.model_type} model, which {auto.__name__} does not take.") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model, which pads with its end token where it has no padding of its own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is None or is_empty(tokenizer):
        raise PruneError(
            f"no tokenizer can be loaded from {name!r}; save the one that the model was trained with beside it "
            "(tokenizer.save_pretrained)."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str, size: int | None, channels: int) -> Any:
    """The image processor beside a model, for images of `size` where that is given.

    Where there is none, and a size, one that scales to `size` x `size` and to [-1, 1].
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if size is None:
            raise PruneError(
                f"no image processor can be loaded from {name!r} (preprocessor_config.json); copy the one of the "
                "original model there, or pass --image-size for one that scales to [-1, 1]."
            ) from error
        return _plain_processor(size, channels)
    if size is not None:
        sizes = {key: size for key, value in dict(processor.size).items() if value is not None}
        return type(processor).from_dict({**processor.to_dict(), "size": sizes, "crop_size": None})
    return processor


def _plain_processor(size: int, channels: int) -> Any:
    from transformers import ViTImageProcessorPil

    half = [0.5] * channels
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half)
