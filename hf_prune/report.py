"""What a run kept, counted from its plan: the numbers of logs, cards and `pruning.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hf_prune.config import PruneConfig
from hf_prune.parts.structures import GroupUnits
from hf_prune.types import Paper, Plan, Report, Structure


@dataclass(frozen=True)
class Summary:
    """Units per structure, and counts of the weights (not biases or norm parameters) that all of them cover."""

    layers: Mapping[str, dict[str, Any]]
    prunable: int
    kept: int

    @property
    def sparsity(self) -> float:
        """Fraction of prunable weights removed; 0 where nothing is prunable."""
        return 1.0 - self.kept / self.prunable if self.prunable else 0.0

    def report(self, config: PruneConfig, paper: Paper, model: nn.Module, frozen: Mapping[str, str]) -> Report:
        """The record of the finished run; `model` still has its dense shapes."""
        return Report(
            method=config.method,
            config=config.to_dict(),
            paper=asdict(paper),
            sparsity=self.sparsity,
            layers=dict(self.layers),
            parameters={
                "dense": sum(parameter.numel() for parameter in model.parameters()),
                "prunable": self.prunable,
                "kept": self.kept,
            },
            frozen=dict(frozen),
        )


def summarise(structures: Sequence[Structure], plan: Plan) -> Summary:
    """Count what `plan` keeps of each structure, and of the weights that they cover together."""
    layers, tensors = {}, _Weights()
    for structure in structures:
        alive = int(plan[structure.name].sum())
        layers[structure.name] = {"structure": type(structure).__name__, "units": structure.units, "kept": alive}
        if isinstance(structure, GroupUnits):
            layers[structure.name]["indices"] = plan[structure.name].nonzero()[:, 0].tolist()
            tensors.narrow(structure, alive)
        else:
            tensors.thin(structure, alive)
    return Summary(layers, tensors.prunable, tensors.kept)


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

    @property
    def prunable(self) -> int:
        return sum(math.prod(shape) for shape in self._sizes.values())

    @property
    def kept(self) -> int:
        return self._thinned + sum(math.prod(sizes) for sizes in self._narrow.values())
