"""Which weights a method may prune: chosen by globs, or the linear and conv layers of the model's repeated blocks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.types import PruneError

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


def prunable_weights(model: nn.Module, include: Iterable[str], exclude: Iterable[str]) -> dict[str, nn.Module]:
    """Names of the weights to prune -> the modules that hold them, in module order.

    Without `include`: linear and conv layers inside the model's repeated blocks (its `nn.ModuleList`s), which leaves
    embeddings, pooler and task head alone; a model without such blocks gives all but its last layer.

    Raises:
        PruneError: nothing matched, a glob that matches no layer, or a weight shared by two modules.
    """
    layers: dict[str, nn.Module] = {n: module for n, module in model.named_modules() if isinstance(module, PRUNABLE)}
    include, exclude = tuple(include), tuple(exclude)
    for pattern in (*include, *exclude):
        if not fnmatch.filter(layers, pattern):
            raise PruneError(
                f"pattern {pattern!r} matches none of the model's {len(layers)} linear and conv layers"
                f"{_example(layers)}; patterns are globs over whole module names, such as 'bert.encoder.*'."
            )
    chosen = (
        [n for n in layers if any(fnmatch.fnmatchcase(n, p) for p in include)] if include else _inner(model, layers)
    )
    chosen = [n for n in chosen if not any(fnmatch.fnmatchcase(n, p) for p in exclude)]
    if not chosen:
        raise PruneError(
            f"no layer of {type(model).__name__} is left to prune (include={include}, exclude={exclude})"
            f"{_example(layers)}."
        )
    _refuse_shared(model, {f"{n}.weight": layers[n] for n in chosen})
    return {f"{name}.weight": layers[name] for name in chosen}


def _example(layers: Iterable[str]) -> str:
    first = next(iter(layers), None)
    return f", for example {first!r}" if first is not None else ""


def _inner(model: nn.Module, layers: Iterable[str]) -> list[str]:
    repeated = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inner = [name for name in layers if name.startswith(repeated)] if repeated else []
    return inner or list(layers)[:-1]


def _refuse_shared(model: nn.Module, weights: dict[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in weights.items():
        shared = [other for other in owners.get(id(module.weight), []) if other != name]
        if shared:
            raise PruneError(
                f"weight {name!r} is the same tensor as {', '.join(shared)}; a shared weight cannot have a mask of its "
                f"own. Add {name.removesuffix('.weight')!r} to exclude."
            )
