"""Open a checkpoint with the class that its config names."""

from __future__ import annotations

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
    return getattr(transformers, architectures[0]).from_pretrained(name)
