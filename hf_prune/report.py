"""What a run kept, counted from its plan: the numbers of logs, cards and `pruning.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hf_prune.config import PruneConfig
from hf_prune.parts.structures import GroupUnits
from hf_prune.types import Paper, Plan, Report, Structure


@dataclass(frozen=True)
class Summary:
    """Counts of weights (not biases or norm parameters) per structure."""

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
    """Count what `plan` keeps of each structure."""
    layers, prunable, kept = {}, 0, 0
    for structure in structures:
        alive, size = int(plan[structure.name].sum()), structure.unit_size
        layers[structure.name] = {
            "structure": type(structure).__name__,
            "units": structure.units,
            "kept": alive,
            "weights_per_unit": size,
        }
        if isinstance(structure, GroupUnits):
            layers[structure.name]["indices"] = plan[structure.name].nonzero()[:, 0].tolist()
        prunable += structure.units * size
        kept += alive * size
    return Summary(layers, prunable, kept)
