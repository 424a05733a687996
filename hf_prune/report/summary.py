"""What a run kept, counted from its plan: the numbers of logs, cards and `pruning.json`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from hf_prune.config import PruneConfig
from hf_prune.parts.structures import GroupUnits, LayerUnits
from hf_prune.types import Paper, Plan, Report, Structure


def sparsity(structures: Sequence[Structure], plan: Plan) -> float:
    """Fraction of the weights that all structures cover which `plan` removes; 0 where they cover none."""
    return _count(structures, plan).sparsity


def make_report(
    structures: Sequence[Structure],
    plan: Plan,
    config: PruneConfig,
    paper: Paper,
    model: nn.Module,
    frozen: Mapping[str, str],
) -> Report:
    """The record of the finished run; `model` still has its dense shapes."""
    weights = _count(structures, plan)
    return Report(
        method=config.method,
        config=config.to_dict(),
        paper=asdict(paper),
        sparsity=weights.sparsity,
        layers={structure.name: _layer(structure, plan[structure.name]) for structure in structures},
        parameters={
            "dense": sum(parameter.numel() for parameter in model.parameters()),
            "prunable": weights.prunable,
            "kept": weights.kept,
        },
        frozen=dict(frozen),
    )


def chain(first: Report, then: Report) -> Report:
    """What two runs in a row did to the model that the first one began with; other fields are the second's."""
    before, after = first.parameters, then.parameters
    shrunk = any("indices" in layer for layer in first.layers.values())  # what went is no longer there to be counted
    kept = after["kept"] + (before["kept"] - after["prunable"] if shrunk else 0)
    return dataclasses.replace(
        then,
        sparsity=1.0 - kept / before["prunable"] if before["prunable"] else then.sparsity,
        layers={name: _chained(layer, then.layers.get(name)) for name, layer in first.layers.items()},
        parameters={**before, "kept": kept},
        prices={name: {**price, "kept": then.prices.get(name, price)["kept"]} for name, price in first.prices.items()},
        frozen=first.frozen | then.frozen,
    )


def _chained(first: dict[str, Any], then: dict[str, Any] | None) -> dict[str, Any]:
    if then is None:
        return first
    layer = {**first, "kept": then["kept"]}
    if "indices" in first:
        layer["indices"] = [first["indices"][each] for each in then["indices"]]
    return layer


def _layer(structure: Structure, keep: Tensor) -> dict[str, Any]:
    layer = {"structure": type(structure).__name__, "units": structure.units, "kept": int(keep.sum())}
    if isinstance(structure, LayerUnits):
        return {**layer, "role": "layers", "indices": structure.remaining(keep)}
    if not isinstance(structure, GroupUnits):
        return layer
    return {**layer, "role": structure.group.role, "indices": keep.nonzero()[:, 0].tolist()}


def _count(structures: Sequence[Structure], plan: Plan) -> _Weights:
    weights = _Weights()
    for structure in structures:
        keep = plan[structure.name]
        alive = int(keep.sum())
        if isinstance(structure, GroupUnits):
            weights.narrow(structure, alive)
        elif isinstance(structure, LayerUnits):
            weights.shorten(structure, keep)
        else:
            weights.thin(structure, alive)
    return weights


class _Weights:
    """Weights left in tensors of which groups, several to one tensor, take slices, or structures take units."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._narrow: dict[str, list[int]] = {}
        self._thinned = 0

    def narrow(self, structure: GroupUnits, alive: int) -> None:
        shapes = {name: shape for name, shape in structure.shapes if len(shape) > 1}
        for member in structure.group.members:
            if member.tensor in shapes:
                self._sizes.setdefault(member.tensor, shapes[member.tensor])
                sizes = self._narrow.setdefault(member.tensor, list(shapes[member.tensor]))
                sizes[member.dim] -= member.outer * member.inner * (structure.units - alive)

    def thin(self, structure: Structure, alive: int) -> None:
        self._sizes[structure.name] = (structure.units * structure.unit_size,)
        self._thinned += alive * structure.unit_size

    def shorten(self, structure: LayerUnits, keep: Tensor) -> None:
        self._sizes[structure.name] = (sum(structure.weights),)
        self._thinned += sum(itertools.compress(structure.weights, keep.tolist()))

    @property
    def prunable(self) -> int:
        return sum(math.prod(shape) for shape in self._sizes.values())

    @property
    def kept(self) -> int:
        return self._thinned + sum(math.prod(sizes) for sizes in self._narrow.values())

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / self.prunable if self.prunable else 0.0
