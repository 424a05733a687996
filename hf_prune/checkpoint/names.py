"""What a tensor or module of a checkpoint is called in the model at hand, and the other way round.

A model of another class than the one saved has its names under a prefix more or less (a bare encoder, another head);
and transformers renames tensors between versions, writing the oldest names to disk. Tables go by the names on disk, so
that they stay right when a newer transformers renames again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion

from hf_prune.graph.table import tensors_of
from hf_prune.types import ShapeTable


def tensor_names(names: Collection[str], model: Any) -> tuple[dict[str, str], bool]:
    """Names on disk -> names in `model`, unknown ones left out; and whether any lost or gained the model's prefix."""
    known = tensors_of(model)
    renamings = _renamings(model)
    found: dict[str, str] = {}
    moved = False
    for name in names:
        # A name may already be the model's own, as it was when this version of transformers saved it.
        for rules in (renamings, []):
            plain = rename_source_key(name, rules, [])[0]
            local = rename_source_key(name, rules, [], model.base_model_prefix or None, known)[0]
            if local in known:
                found[name] = local
                moved = moved or local != plain
                break
    return found, moved


def module_names(names: Collection[str], model: Any) -> dict[str, str]:
    """Module names of a checkpoint -> names in `model`, all under a prefix more or less; unknown ones left out."""
    known = dict(model.named_modules())
    prefix = model.base_model_prefix
    ways = [{name: name for name in names}]
    if prefix:
        ways.append({name: "" if name == prefix else name.removeprefix(f"{prefix}.") for name in names})
        ways.append({name: f"{prefix}.{name}" if name else prefix for name in names})
    best = max(ways, key=lambda way: sum(local in known for local in way.values()))
    return {name: local for name, local in best.items() if local in known}


def disk_names(model: Any) -> dict[str, str]:
    """Names in `model` -> names on disk, without tensors that are stored in pieces or merged with others."""
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors_of(model).items()}
    names = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(stand_ins)).items()}
    return {name: names[id(tensor)] for name, tensor in stand_ins.items() if id(tensor) in names}


def renamed_on_disk(model: Any) -> bool:
    """Whether transformers saves `model` under other names, or in other pieces, than its own."""
    names = disk_names(model)
    return any(names.get(name) != name for name in tensors_of(model))


def state_on_disk(model: Any, state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`state` of `model` as it is stored, with `names` from `disk_names` and other tensors taken apart or merged."""
    rest = {name: tensor for name, tensor in state.items() if name not in names}
    kept = {names[name]: tensor for name, tensor in state.items() if name in names}
    return kept | revert_weight_conversion(model, rest)


def table_on_disk(narrow: ShapeTable, names: Mapping[str, str]) -> ShapeTable:
    """`narrow` with its tensors named as on disk, where `names` (from `disk_names`) has them."""
    return replace(narrow, shapes={names.get(name, name): shape for name, shape in narrow.shapes.items()})


def packable(model: Any, names: Mapping[str, str], suffix: str) -> set[str]:
    """Those of `names` (from `disk_names`) that may have a side tensor `<name>_<suffix>`.

    The model must have no tensor of that name, and must rename the side tensor as it renames the tensor when it loads.
    """
    renamings = _renamings(model)
    taken = names.keys() | names.values()
    sides = {name: (f"{name}_{suffix}", f"{disk}_{suffix}") for name, disk in names.items()}
    return {
        name
        for name, (own, disk) in sides.items()
        if not {own, disk} & taken and own in (disk, rename_source_key(disk, renamings, [])[0])
    }


def _renamings(model: Any) -> list[WeightRenaming]:
    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
