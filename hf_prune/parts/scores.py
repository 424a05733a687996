"""Scores that read the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_prune.parts.gates import parametrizations
from hf_prune.types import Structure


def magnitude(model: nn.Module, structures: Sequence[Structure]) -> Callable[[], Mapping[str, Tensor]]:
    """Mean absolute weight of each unit, over its weights and not its biases; reads the dense weights under a mask."""

    @torch.no_grad()
    def scores() -> dict[str, Tensor]:
        return {structure.name: _mean_absolute(model, structure) for structure in structures}

    return scores


def _mean_absolute(model: nn.Module, structure: Structure) -> Tensor:
    weights = {name: dense_parameter(model, name) for name in structure.tensors}
    views = [structure.view(weight.float().abs(), name) for name, weight in weights.items() if weight.ndim > 1]
    if len(views) == 1 and views[0].shape[1] == 1:
        return views[0][:, 0]
    return torch.cat(views, dim=1).mean(1)


def dense_parameter(model: nn.Module, tensor: str) -> Tensor:
    """The trained parameter behind `tensor`, without the mask that a gate may have put over it."""
    path, _, attribute = tensor.rpartition(".")
    module = model.get_submodule(path)
    if parametrize.is_parametrized(module, attribute):
        return parametrizations(module, attribute).original
    return getattr(module, attribute)
