"""Integer attributes of modules: tagged with their name while a model is traced, rewritten when it shrinks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_prune.graph.traced_int import Attribute, TracedInt

CONFIG = "config."
"""Begins the name of an attribute that belongs to the config of a module."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Whatever happens to attributes, modes, tensors and hooks of any module inside is undone afterwards."""
    states = [
        (module, dict(module.__dict__), {name: dict(value) for name, value in module.__dict__.items() if isinstance(value, dict)})
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
    if _is_int(value):
        return TracedInt(value, Attribute(path, name, None, value))
    if type(value) in (tuple, list) and value and all(map(_is_int, value)):
        return type(value)(TracedInt(item, Attribute(path, name, index, item)) for index, item in enumerate(value))
    return value


def read(model: nn.Module, path: str, name: str) -> Any:
    """Attribute `name` of the module at `path`; `config.x` reads its config."""
    module = model.get_submodule(path)
    return getattr(module.config, name.removeprefix(CONFIG)) if name.startswith(CONFIG) else getattr(module, name)


def rewrite(model: nn.Module, attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]) -> None:
    """Set attributes of modules; one named `config.x` goes into a copy of the config that the module alone owns."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            value = list(value) if isinstance(read(model, path, name), list) else value
            if name.startswith(CONFIG):
                module.config = copy.copy(module.config)
                setattr(module.config, name.removeprefix(CONFIG), value)
            else:
                setattr(module, name, value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
