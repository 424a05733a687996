"""What a table of narrow shapes may say about a model. Tables come from checkpoints, so nothing in them is trusted."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from hf_prune.graph.sizes import fixed_dims, may_be_empty
from hf_prune.types import CheckpointError, ShapeTable

CONFIG = "config."
"""Prefix of an attribute that lives in the module's config."""


def check(model: nn.Module, table: ShapeTable) -> None:
    """Raise `CheckpointError` unless every entry of `table` names something in `model` and narrows it."""
    tensors = tensors_of(model)
    modules = dict(model.named_modules())
    require_known(table.shapes, tensors, "tensor")
    require_known(table.attributes, modules, "module")
    for name, shape in table.shapes.items():
        _check_shape(name, shape, tensors[name].shape, modules[owner_and_leaf(name)[0]])
        for alias in aliases(tensors, tensors[name]):
            if table.shapes.get(alias, shape) != shape:
                raise CheckpointError(
                    f"shapes: {name!r} is {list(shape)} and {alias!r} is {list(table.shapes[alias])}, but the model "
                    f"ties these two; give both the same shape."
                )
    check_buffers(model, table.buffers)
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name, attributes in table.attributes.items():
        for attribute, value in attributes.items():
            _check_attribute(modules[name], name, attribute, value, largest)


def check_buffers(model: nn.Module, buffers: Mapping[str, Sequence[int]]) -> None:
    """Raise `CheckpointError` unless every entry of `buffers` picks entries, in order, of a buffer that code makes."""
    made = made_buffers(model)
    require_known(buffers, made, "buffer")
    for name, entries in buffers.items():
        size = len(made[name])
        ascending = all(low < high for low, high in itertools.pairwise(entries))
        if not entries or not ascending or entries[0] < 0 or entries[-1] >= size:
            raise CheckpointError(
                f"buffers[{name!r}] must be ascending places of its {size} entries, one or more, got {list(entries)!r}."
            )


def made_buffers(model: nn.Module) -> dict[str, Tensor]:
    """One-dimensional buffers that code makes anew when a model is built, for no checkpoint holds them."""
    stored = model.state_dict()
    return {name: each for name, each in model.named_buffers() if name not in stored and each.ndim == 1}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of `model` holds, tied ones under each of their names."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def aliases(tensors: Mapping[str, Tensor], tensor: Tensor) -> list[str]:
    """The names in `tensors` that are `tensor` itself: more than one where parameters are tied."""
    return [name for name, other in tensors.items() if other is tensor]


def owner_and_leaf(name: str) -> tuple[str, str]:
    """Module and attribute that a tensor name stands for."""
    owner, _, leaf = name.rpartition(".")
    return owner, leaf


def is_size(value: Any) -> bool:
    """Whether `value` is an int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_sizes(value: Any) -> bool:
    """Whether `value` is a list or tuple of ints."""
    return isinstance(value, (list, tuple)) and all(map(is_size, value))


def attribute_holder(module: nn.Module, attribute: str) -> tuple[Any, str]:
    """The object and plain name behind `attribute`: the module itself, or its config for `config.x`."""
    if attribute.startswith(CONFIG):
        return getattr(module, "config", None), attribute.removeprefix(CONFIG)
    return module, attribute


def require_known(names: Iterable[str], known: Collection[str], kind: str) -> None:
    """Raise `CheckpointError`, naming the closest of `known`, for the first of `names` that is not among them."""
    unknown = next((name for name in names if name not in known), None)
    if unknown is None:
        return
    near = get_close_matches(unknown, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Was this checkpoint made for another architecture or version?"
    raise CheckpointError(f"Unknown {kind} {unknown!r}. {hint}")


def _check_shape(name: str, shape: Sequence[int], dense: Sequence[int], module: nn.Module) -> None:
    if not is_sizes(shape) or len(shape) != len(dense):
        raise CheckpointError(
            f"shapes[{name!r}] must be {len(dense)} ints, one for each of {list(dense)}, got {shape!r}."
        )
    smallest = 0 if may_be_empty(module) else 1
    for dim, (size, limit) in enumerate(zip(shape, dense, strict=True)):
        low = limit if dim >= fixed_dims(module) else min(smallest, limit)
        if not low <= size <= limit:
            raise CheckpointError(
                f"shapes[{name!r}] is {list(shape)}; dimension {dim} must lie between {low} and {limit}, the size that "
                f"the config of this {type(module).__name__} builds."
            )


def _check_attribute(module: nn.Module, name: str, attribute: str, value: Any, largest: int) -> None:
    where = f"attributes[{name!r}][{attribute!r}]"
    holder, plain = attribute_holder(module, attribute)
    if plain.startswith("_") or not hasattr(holder, "__dict__") or not _is_replayable(getattr(holder, plain, None)):
        raise CheckpointError(
            f"{where} must name an existing int or tuple of ints without a leading underscore; "
            f"{type(module).__name__} has no such attribute."
        )
    old = getattr(holder, plain)
    if is_size(value) != is_size(old) or not _is_replayable(value) or len(_as_tuple(value)) != len(_as_tuple(old)):
        raise CheckpointError(f"{where} must be like the {old!r} that it replaces, got {value!r}.")
    limit = max(largest, *_as_tuple(old), 0)
    if not all(0 <= item <= limit for item in _as_tuple(value)):
        raise CheckpointError(f"{where} must lie between 0 and {limit}, the largest size in this model, got {value!r}.")


def _is_replayable(value: Any) -> bool:
    return is_size(value) or is_sizes(value)


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if is_size(value) else tuple(value)
