"""Scores that read the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_prune.parts.gates import parametrizations
from hf_prune.parts.randomness import generator
from hf_prune.parts.structures import LayerUnits
from hf_prune.types import Structure


def unit_norms(model: nn.Module, structures: Sequence[Structure], *, order: int) -> Callable[[], Mapping[str, Tensor]]:
    """Mean absolute weight (`order` 1) or root mean square (2) of each unit; reads the dense weights under a mask.

    Weights count, biases and norm parameters do not; of a group, the tensors that produce it.
    """

    @torch.no_grad()
    def scores() -> dict[str, Tensor]:
        return {structure.name: _unit_norm(model, structure, order) for structure in structures}

    return scores


def _unit_norm(model: nn.Module, structure: Structure, order: int) -> Tensor:
    weights = {name: dense_parameter(model, name) for name in structure.producers}
    if isinstance(structure, LayerUnits):
        return _layer_norms(structure, weights, order)
    views = [structure.view(weight.float(), name) for name, weight in weights.items() if weight.ndim > 1]
    units = views[0] if len(views) == 1 else torch.cat(views, dim=1)
    if units.shape[1] == 1:
        return units[:, 0].abs()
    return units.abs().mean(1) if order == 1 else units.square().mean(1).sqrt()


def _layer_norms(structure: LayerUnits, weights: Mapping[str, Tensor], order: int) -> Tensor:
    """The same of whole layers, one tensor at a time: their `view` would be as large as all of them together."""
    means = []
    for layer, count in zip(structure.stack.layers, structure.weights, strict=True):
        own = (weights[name] for name in layer.parameters if weights[name].ndim > 1)
        means.append(torch.stack([each.float().abs().pow(order).sum() for each in own]).sum() / max(1, count))
    return torch.stack(means).pow(1 / order)


def random_ranks(structure: Structure, seed: int) -> Tensor:
    """Ranks of a shuffle that depends on the seed and the name alone, in (0, 1] whatever the number of units."""
    order = torch.randperm(structure.units, generator=generator(seed, structure.name))
    return (order + 1) / structure.units


def dense_parameter(model: nn.Module, tensor: str) -> Tensor:
    """The trained parameter behind `tensor`, without the mask that a gate may have put over it."""
    path, _, attribute = tensor.rpartition(".")
    module = model.get_submodule(path)
    if parametrize.is_parametrized(module, attribute):
        return parametrizations(module, attribute).original
    return getattr(module, attribute)
