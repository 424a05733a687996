"""Open a checkpoint with the class that its config names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from hf_prune.types import PruneError


def load_pretrained(name: str, role: str = "model") -> PreTrainedModel:
    """The model of a folder or Hub id, in the architecture that it was saved with.

    role: what to call it in errors.

    Raises:
        PruneError: nothing loadable under that name.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PruneError(f"no {role} can be loaded from {name!r}: {str(error).splitlines()[0]}") from error
    architectures = config.architectures or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise PruneError(
            f"the config of {role} {name!r} names no model class of transformers (architectures={architectures}); "
            "load it yourself and pass the model."
        )
    with readable(name):
        return getattr(transformers, architectures[0]).from_pretrained(name)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what is raised for weights that are torn or absent into a `PruneError`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise PruneError(f"the weights of {name!r} cannot be read: {str(error).splitlines()[0]}") from error


def load_processor(name: str) -> Any:
    """The tokenizer, image processor or other processor saved beside a model; None where there is none."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None
    return None if is_empty(found) else found


def is_empty(processor: Any) -> bool:
    """Whether it is a tokenizer without a vocabulary, which transformers makes where a folder has no tokenizer."""
    special = getattr(processor, "all_special_tokens", None)
    return special is not None and hasattr(processor, "get_vocab") and len(processor) <= len(special)
