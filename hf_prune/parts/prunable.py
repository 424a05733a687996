"""Which weights and which groups a method may prune: chosen by globs over module names, or those a model repeats."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.graph.trace import names_of_parameters
from hf_prune.types import Group, LayerStack, Member, PruneError

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
    owners = names_of_parameters(model)
    for name, module in weights.items():
        shared = [other for other in owners.get(id(module.weight), []) if other != name]
        if shared:
            raise PruneError(
                f"weight {name!r} is the same tensor as {', '.join(shared)}; a shared weight cannot have a mask of its "
                f"own. Add {name.removesuffix('.weight')!r} to exclude."
            )


def prunable_groups(
    model: nn.Module,
    groups: Mapping[str, Group],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    normalised: bool = False,
) -> list[Group]:
    """Groups that a module matching `include` (any, without it) produces, and of which no member matches `exclude`.

    normalised: also those under LayerNorm-like statistics, whose shrinking is not exact.

    Raises:
        PruneError: nothing is left.
    """
    include, exclude = tuple(include), tuple(exclude)
    allowed = [group for group in groups.values() if normalised or not group.normalised]
    chosen = [group for group in allowed if _named(group, include, exclude)]
    if not chosen:
        raise PruneError(
            f"no group of {type(model).__name__} is left to prune among {len(groups)} (include={include}, "
            f"exclude={exclude}); `hf_prune.graph.trace(model, inputs).groups` lists them."
        )
    return chosen


def prunable_stacks(
    stacks: Mapping[str, LayerStack],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    normalised: bool = False,
) -> list[LayerStack]:
    """Stacks whose own name, such as 'vit.layers', matches `include` (any, without it) and not `exclude`.

    normalised: also those with a norm on the residual path, where taking a layer out is not exact.

    Raises:
        PruneError: nothing is left.
    """
    allowed = [stack for stack in stacks.values() if normalised or not stack.normalised]
    include, exclude = tuple(include) or ("*",), tuple(exclude)
    chosen = [each for each in allowed if _matches({each.name}, include) and not _matches({each.name}, exclude)]
    if not chosen:
        inexact = [stack.name for stack in stacks.values() if stack.normalised]
        hint = f"; post-norm, where it is not exact (normalised_groups=True takes them): {inexact}" if inexact else ""
        raise PruneError(
            f"no stack of layers is left to prune among {list(stacks)} (include={include}, exclude={exclude}){hint}."
        )
    return chosen


def _named(group: Group, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    producers = {_module(member) for member in group.members if not member.reads}
    everyone = {_module(member) for member in group.members}
    return (not include or _matches(producers, include)) and not _matches(everyone, exclude)


def _module(member: Member) -> str:
    return member.tensor.rpartition(".")[0]


def _matches(modules: set[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for module in modules for pattern in patterns)
