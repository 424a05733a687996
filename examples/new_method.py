"""Write a new method: the weights that lie closest to their row's mean go. One file with these few names is all.

python examples/new_method.py --tiny     # prunes a model with it and holds it to the contract of every method
"""

import argparse
import sys
from dataclasses import dataclass

import torch

import hf_prune
from hf_prune import methods
from hf_prune.config import PruneConfig
from hf_prune.parts import schedules, structures
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import dense_parameter
from hf_prune.parts.selection import top_k
from hf_prune.testing import CHECKS, tiny_cases
from hf_prune.tiny_models import tiny_text_model
from hf_prune.types import Paper

PAPER = Paper(title="Rows Without Their Mean", authors="You", year=2026, bibtex="@misc{you2026rows}")
NEEDS_TRAINING = False  # hf_prune.prune takes it as well as PruneTrainer
GOALS = ("final_sparsity",)


@dataclass(frozen=True)
class DeviationConfig(PruneConfig):
    """What the method can be told; shared fields (goal, include, begin, end, ...) come from PruneConfig."""

    method = "deviation"

    power: float = 1.0  # score = |w - mean of its row| ** power

    def __post_init__(self):
        super().__post_init__()
        if self.final_sparsity is None:
            raise ValueError("DeviationConfig needs final_sparsity, the fraction of weights to remove.")


Config = DeviationConfig


def build(model, graph, config):
    """The recipe: single weights, ranked by the score at each step of the schedule, masked until the end."""
    units = structures.element_structures(prunable_weights(model, config.include, config.exclude))

    @torch.no_grad()
    def scores():
        weights = {unit.name: dense_parameter(model, unit.name).flatten(1) for unit in units}
        return {n: ((w - w.mean(1, keepdim=True)).abs() ** config.power).flatten() for n, w in weights.items()}

    return Recipe(
        structures=units,
        scores=scores,
        selection=top_k(units, config.goal, scope=config.scope, min_keep=config.min_keep),
        schedule=schedules.cubic(config.begin, config.end),
        gates=[MaskGate(unit, next(model.parameters()).device) for unit in units],
    )


TINY = {"plain": DeviationConfig(final_sparsity=0.6, begin=0.2, end=0.6)}  # for the contract tests

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="what it does anyway")
    parser.parse_args()
    methods.METHODS["deviation"] = "__main__"  # in the package: its line in hf_prune/methods/__init__.py
    assert hf_prune.DeviationConfig is sys.modules["__main__"].DeviationConfig
    model, report = hf_prune.prune(tiny_text_model(), DeviationConfig(final_sparsity=0.5))
    print(f"{report.sparsity:.0%} of the weights removed")
    for case in tiny_cases("deviation"):
        for check in CHECKS:
            check(case)
    print(f"{len(CHECKS)} checks hold")
