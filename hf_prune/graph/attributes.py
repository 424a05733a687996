"""Integer attributes of modules: tagged with their name while a model is traced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_prune.graph.table import CONFIG, is_size
from hf_prune.graph.traced_int import Attribute, TracedInt


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Whatever happens to attributes, modes, tensors and hooks of any module inside is undone afterwards."""
    states = [
        (
            module,
            dict(module.__dict__),
            {name: dict(value) for name, value in module.__dict__.items() if isinstance(value, dict)},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, state, contents in states:
            module.__dict__.clear()
            module.__dict__.update(state)
            for name, content in contents.items():
                state[name].clear()
                state[name].update(content)


def tag(model: nn.Module) -> None:
    """Replace every int attribute, alone or in a sequence, by a `TracedInt`; each module gets its own tagged config."""
    for path, module in model.named_modules():
        for name, value in list(module.__dict__.items()):
            if name.startswith("_"):
                continue
            if isinstance(value, PreTrainedConfig) and name == "config":
                module.__dict__[name] = _tagged_config(value, path)
            else:
                module.__dict__[name] = _tagged(value, path, name)


def _tagged_config(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    own = copy.copy(config)
    for name, value in list(own.__dict__.items()):
        if not name.startswith("_"):
            own.__dict__[name] = _tagged(value, path, CONFIG + name)
    return own


def _tagged(value: Any, path: str, name: str) -> Any:
    if is_size(value):
        return TracedInt(value, Attribute(path, name, None, value))
    if type(value) in (tuple, list) and value and all(map(is_size, value)):
        return type(value)(TracedInt(item, Attribute(path, name, index, item)) for index, item in enumerate(value))
    return value
