"""Replay a table of narrow shapes on a freshly built model, and read such a table off a narrow model.

The table holds only what a config cannot say. Sizes that known layers keep beside their tensors follow from the
tensors (`sizes.sync_attributes`); other integers are replayed by name. No value moves: resized tensors are new and
uninitialised, so the same code serves models on meta and on a device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.graph.sizes import Size, sync_attributes
from hf_prune.graph.table import (
    CONFIG,
    aliases,
    attribute_holder,
    check,
    is_size,
    is_sizes,
    made_buffers,
    owner_and_leaf,
    tensors_of,
)
from hf_prune.types import CheckpointError, ShapeTable

Attributes = Mapping[str, Mapping[str, Size]]


def resize(model: nn.Module, table: ShapeTable) -> None:
    """Give `model`, as its config builds it, the shapes and attributes of `table`, in place.

    The table is checked whole before anything changes (`CheckpointError`). Dtype, device, `requires_grad` and tied
    parameters stay as they were.
    """
    check(model, table)
    modules = dict(model.named_modules())
    tensors = tensors_of(model)
    narrow = {
        id(tensors[name]): (aliases(tensors, tensors[name]), _empty(tensors[name], shape))
        for name, shape in table.shapes.items()
    }
    for names, tensor in narrow.values():
        for owner, leaf in map(owner_and_leaf, names):
            setattr(modules[owner], leaf, tensor)
            sync_attributes(modules[owner])
    # Attributes come last: they hold what the tensors do not say, such as the groups of a conv.
    rewrite(model, table.attributes)
    pick(model, table.buffers)


def pick(model: nn.Module, buffers: Mapping[str, Sequence[int]]) -> None:
    """Leave of each buffer the entries given, whose values it has."""
    for name, entries in buffers.items():
        owner, leaf = owner_and_leaf(name)
        old = model.get_buffer(name)
        setattr(model.get_submodule(owner), leaf, old[torch.tensor(entries, device=old.device)])


def shape_table(model: nn.Module, build: Callable[[], nn.Module], recorded: ShapeTable | None = None) -> ShapeTable:
    """What `resize` must replay to turn the model that `build` makes into `model`; empty for a dense model.

    `build` runs on meta. Only differences are read, so nothing needs to remember how `model` became narrow; `recorded`
    names attributes (their values are ignored) that are also compared in modules without narrow tensors, and says which
    entries are left of buffers. Raises `CheckpointError` where the two differ by more than sizes, such as by tensors
    added (gates, parametrizations).
    """
    recorded = recorded or ShapeTable()
    with torch.device("meta"):
        twin = build()
    tensors, wanted = tensors_of(model), tensors_of(twin)
    if extra := sorted(tensors.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"{type(model).__name__} and what its config builds must hold the same tensors, but {extra[:3]} "
            f"{'is' if len(extra) == 1 else 'are'} in one only. Fold gates and remove parametrizations first "
            f"(Pruner.finalize), and keep the config in step with the model."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.shape != wanted[name].shape}
    resize(twin, ShapeTable(shapes))
    attributes = _attribute_differences(model, twin, owners(shapes), recorded.attributes)
    buffers = {name: entries for name, entries in recorded.buffers.items() if name in made_buffers(model)}
    check(twin, ShapeTable(attributes=attributes, buffers=buffers))
    return ShapeTable(shapes, attributes, buffers)


def _empty(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def rewrite(model: nn.Module, attributes: Attributes) -> None:
    """Set attributes of modules; one named `config.x` goes into a copy of the config that the module alone owns."""
    for name, values in attributes.items():
        for attribute, value in values.items():
            _write(model.get_submodule(name), attribute, value)


def _write(module: nn.Module, attribute: str, value: Size) -> None:
    if attribute.startswith(CONFIG):
        module.config = copy.copy(module.config)
    holder, plain = attribute_holder(module, attribute)
    kind = type(getattr(holder, plain))
    setattr(holder, plain, value if is_size(value) else kind(value))


def owners(names: Iterable[str]) -> set[str]:
    """The modules that hold a tensor of `names`, directly or further down; the root is ''."""
    parts = [name.split(".")[:-1] for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(len(part) + 1)}


def _attribute_differences(
    model: nn.Module, twin: nn.Module, suspects: set[str], recorded: Attributes
) -> dict[str, dict[str, Size]]:
    """Attributes whose value in `model` is not that of `twin`.

    Only `suspects` are searched: elsewhere an integer may be state, such as the length that a rotary embedding cached.
    """
    twins = dict(twin.named_modules())
    differences: dict[str, dict[str, Size]] = {}
    for name, module in model.named_modules():
        sizes, old = _sizes(module), _sizes(twins[name]) if name in twins else {}
        named = sizes.keys() if name in suspects else sizes.keys() & recorded.get(name, {}).keys()
        changed = {key: sizes[key] for key in sorted(named & old.keys()) if sizes[key] != old[key]}
        if changed:
            differences[name] = changed
    return differences


def _sizes(module: nn.Module) -> dict[str, Size]:
    """Every integer attribute of `module` and, under `config.x`, of its config; lists as tuples."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    config: dict[str, Any] = vars(module.config) if hasattr(getattr(module, "config", None), "__dict__") else {}
    own |= {CONFIG + key: value for key, value in config.items() if not key.startswith("_")}
    return {k: v if is_size(v) else tuple(v) for k, v in own.items() if is_size(v) or is_sizes(v)}
