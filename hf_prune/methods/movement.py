"""Movement pruning: weights that move away from zero stay (Sanh, Wolf & Rush 2020, arXiv 2005.07683).

Idea      a score S per unit learns by gradient descent through a straight-through mask; it grows when its weights move
          away from zero. Masked units keep learning, so they can come back.
Equations M(S) * W forward, dL/dS = W * dL/dW' and dL/dW = M * dL/dW' backward, section 4 -> `gates._StraightThrough`;
          hard: M keeps the highest scores -> `selection.top_k`; soft: M = sigmoid(S) > v with penalty mean sigmoid(S),
          weight lambda * v_t / v_final -> `_soft`; L0: hard concrete of Louizos et al. 2018 -> `HardConcreteMask`;
          magnitude: |W| under the same schedule; cubic schedule of Zhu & Gupta 2017 -> `schedules.cubic`.
Differs   With `final_sparsity`, soft and L0 steer lambda by dual ascent towards it, select exactly by score at `end`
          and keep that plan; without it they are the paper's (no target). L0 draws its noise once per optimizer step,
          the same on every process, instead of once per forward pass. Magnitude scores a unit of several weights by
          its mean |W| (the authors' code masks single weights whatever the structure). The floor is
          max(1, int(min_keep * units)) instead of int(0.005 * units) + 1. Row and column scores are not multiplied
          (their product has no gradient at 0). Evaluation during training uses the plan of that step.
          The hard variant collapses in runs of hundreds of steps (README, limits); soft does not.
Related   `magnitude` needs no training; block movement adds its own penalty weights per kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import Goal, PruneConfig, require_choice, require_range
from hf_prune.parts import schedules, structures
from hf_prune.parts.controllers import DualAscent
from hf_prune.parts.gates import MaskGate, ScoreGate, ScoreMask
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.randomness import generator
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.selection import floor_count, keep_floors, top_k
from hf_prune.types import Paper, Plan, Schedule, Structure

PAPER = Paper(
    title="Movement Pruning: Adaptive Sparsity by Fine-Tuning",
    authors="Victor Sanh, Thomas Wolf, Alexander M. Rush",
    year=2020,
    arxiv="2005.07683",
    bibtex="""@inproceedings{sanh2020movement,
  title     = {Movement Pruning: Adaptive Sparsity by Fine-Tuning},
  author    = {Sanh, Victor and Wolf, Thomas and Rush, Alexander M.},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}""",
)
NEEDS_TRAINING = True
GOALS = ("final_sparsity",)

VARIANTS = ("hard", "soft", "l0", "magnitude")
SCORE_OPTIMIZERS = ("inner", "sgd")
STRUCTURES = ("element", "block", "row", "column", "neuron", "hybrid")

LEFT, RIGHT, BETA = -0.1, 1.1, 2 / 3  # stretch interval and temperature of the hard concrete, section 5
CLOSED = math.log(-LEFT / RIGHT)  # at or below this score a hard concrete gate is exactly 0 outside training
PAPER_PENALTY = {"soft": 400.0, "l0": 125.0}  # SQuAD recipes of the authors' repository
PAPER_SCORE = {"l0": math.log(0.9 / 0.1)}  # starts 90 % open


@dataclass(frozen=True)
class MovementConfig(PruneConfig):
    """Defaults are the paper's SQuAD recipe."""

    method = "movement"

    begin: float = 0.1
    end: float = 0.8
    min_keep: float = 0.005
    variant: str = "hard"  # "hard" (top-k), "soft" (threshold and penalty), "l0" (hard concrete), "magnitude"
    block_shape: tuple[int, int] = (32, 32)  # rows, columns of a unit for structure "block" and "hybrid"
    score_lr: float = 1e-2  # learning rate of the scores at the peak of the schedule (L0 in the paper: 1e-1)
    score_optimizer: str = (
        "inner"  # "inner": the weights' own optimizer, as in the paper's runs; "sgd": as in its eq. 4
    )
    score_init: float | None = None  # first score; None: 0, and 2.197 for L0
    threshold: float = 0.1  # soft: a unit stays while sigmoid(score) exceeds this at the end
    penalty_weight: float | None = None  # soft and L0: lambda; None: the paper's 400 and 125
    penalty_gain: float = 16.0  # soft and L0 with final_sparsity: a gap of 0.1 moves lambda by a factor exp(gain / 10)
    freeze_embeddings: bool = True  # as in the paper; they keep their fine-tuned or pretrained values

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("variant", self.variant, VARIANTS)
        require_choice("structure", self.structure, STRUCTURES)
        require_choice("score_optimizer", self.score_optimizer, SCORE_OPTIMIZERS)
        require_range("threshold", self.threshold, 0.0, 1.0, closed_left=False, closed_right=False)
        require_range("score_lr", self.score_lr, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("score_init", self.first_score, -math.inf, math.inf, closed_left=False, closed_right=False)
        require_range("penalty_weight", self.first_penalty, 0.0, math.inf, closed_right=False)
        require_range("penalty_gain", self.penalty_gain, 0.0, math.inf, closed_right=False)
        if not _is_block(self.block_shape):
            raise ValueError(f"block_shape must be two positive sizes (rows, columns), got {self.block_shape!r}.")
        if self.variant in PAPER_PENALTY and self.first_penalty <= 0:
            raise ValueError(
                f"penalty_weight must be > 0 for variant {self.variant!r}, got {self.penalty_weight}: "
                "without a penalty nothing is ever pruned."
            )
        if self.variant not in PAPER_PENALTY and self.final_sparsity is None:
            raise ValueError(f"variant {self.variant!r} needs final_sparsity, the fraction of weights to remove.")
        if self.final_sparsity == 0:
            raise ValueError(
                "final_sparsity is 0, so nothing would ever be pruned; set it above 0 or use a plain Trainer."
            )

    @property
    def first_penalty(self) -> float:
        """Lambda where the run starts."""
        return PAPER_PENALTY.get(self.variant, 0.0) if self.penalty_weight is None else self.penalty_weight

    @property
    def first_score(self) -> float:
        """Every score where the run starts."""
        return PAPER_SCORE.get(self.variant, 0.0) if self.score_init is None else self.score_init


def _is_block(shape: Any) -> bool:
    return isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape)


Config = MovementConfig


class HardConcreteMask(ScoreMask):
    """Stretched, clamped concrete gates: random while training, their mean's image outside (Louizos, eq. 10-13)."""

    draw: Tensor

    def __init__(self, *arguments: Any, seed: int, **mask_arguments: Any) -> None:
        super().__init__(*arguments, **mask_arguments)
        self.seed = seed
        if not self._owner:
            self.register_buffer("draw", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` times the gate of its unit."""
        gate = self.owner.gate().to(weight.dtype) * self.owner.keep
        if weight.ndim == 1:
            gate = (gate > 0).to(weight.dtype)  # a closed unit's bias goes, an open one's is not scaled
        return weight * self.structure.expand(gate, self.tensor)

    def gate(self) -> Tensor:
        """Gate values in [0, 1], shape `(units,)`; the same draw for every call between two optimizer steps."""
        logits: Tensor = self.scores
        if self.training:
            stream = generator(self.seed, self.structure.name, int(self.draw))
            u = torch.rand(self.scores.shape, generator=stream).clamp(1e-4, 1 - 1e-4).to(self.scores.device)
            logits = (u.log() - (1 - u).log() + self.scores) / BETA
        return (logits.sigmoid() * (RIGHT - LEFT) + LEFT).clamp(0.0, 1.0)


class HardConcreteGate(ScoreGate):
    """A gate that closes by itself where its score falls low enough."""

    mask_type = HardConcreteMask
    owner: HardConcreteMask

    def keep(self) -> Tensor:
        """The plan, without the units whose gates have closed."""
        return self.owner.keep & (self.scores() > CLOSED)


def build(model: nn.Module, graph: Any, config: MovementConfig) -> Recipe:
    """The recipe of `config.variant` over the units of `config.structure`."""
    units = _structures(model, graph, config)
    device = next(model.parameters()).device
    schedule = schedules.cubic(config.begin, config.end)
    parts: dict[str, Any] = {
        "structures": units,
        "schedule": schedule,
        "frozen": _embeddings(model) if config.freeze_embeddings else (),
    }
    return Recipe(**parts, **_VARIANT_PARTS[config.variant](model, units, device, schedule, config))


def _structures(model: nn.Module, graph: Any, config: MovementConfig) -> Sequence[Structure]:
    weights = prunable_weights(model, config.include, config.exclude)
    if config.structure in ("neuron", "hybrid"):
        neurons = structures.neuron_structures(model, graph.groups, weights)
        if config.structure == "neuron":
            return neurons
        tied = {tensor for neuron in neurons for tensor in neuron.tensors}
        rest = {name: module for name, module in weights.items() if name not in tied}
        return [*structures.block_structures(rest, config.block_shape), *neurons]
    if config.structure == "block":
        return structures.block_structures(weights, config.block_shape)
    return _SINGLE[config.structure](weights)


_SINGLE = {
    "element": structures.element_structures,
    "row": structures.row_structures,
    "column": structures.column_structures,
}


def _embeddings(model: nn.Module) -> tuple[str, ...]:
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return tuple(f"{name}.weight" for name in tables)


def _hard(
    model: nn.Module, units: Sequence[Structure], device: torch.device, _: Schedule, config: MovementConfig
) -> dict:
    gates = [ScoreGate(each, device, init=config.first_score) for each in units]
    return {
        "gates": gates,
        "scores": lambda: {gate.name: gate.scores() for gate in gates},
        "selection": top_k(units, _goal(config), scope=config.scope, min_keep=config.min_keep),
        "optimizers": _score_optimizer(config),
    }


def _magnitude(
    model: nn.Module, units: Sequence[Structure], device: torch.device, _: Schedule, config: MovementConfig
) -> dict:
    return {
        "gates": [MaskGate(each, device) for each in units],
        "scores": unit_norms(model, units, order=1),
        "selection": top_k(units, _goal(config), scope=config.scope, min_keep=config.min_keep),
    }


def _soft(
    model: nn.Module, units: Sequence[Structure], device: torch.device, schedule: Schedule, config: MovementConfig
) -> dict:
    gates = [ScoreGate(each, device, init=config.first_score) for each in units]

    def above_threshold(scores: Mapping[str, Tensor], share: float) -> Plan:
        # v_t = v_final * share; at v = 0 every unit stays, sigmoid(S) being positive.
        plan = {n: s.sigmoid() > config.threshold * share for n, s in scores.items()}
        return keep_floors(plan, scores, {n: floor_count(config.min_keep, len(s)) for n, s in scores.items()})

    def penalty() -> Tensor:
        return torch.stack([gate.owner.scores.sigmoid().mean() for gate in gates]).mean()

    parts = _penalised(gates, units, above_threshold, schedule, config)
    # lambda_t = lambda * v_t / v_final = lambda * share: no pressure before the threshold has left 0.
    weight = parts.pop("weight")
    return {**parts, "penalties": {"penalty": lambda progress: weight(progress) * schedule(progress) * penalty()}}


def _l0(
    model: nn.Module, units: Sequence[Structure], device: torch.device, schedule: Schedule, config: MovementConfig
) -> dict:
    gates = [HardConcreteGate(each, device, init=config.first_score, seed=config.seed) for each in units]

    def all_open(scores: Mapping[str, Tensor], share: float) -> Plan:
        return {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}

    def draw_anew() -> None:
        for gate in gates:
            gate.owner.draw += 1

    def penalty() -> Tensor:
        # Probability that a gate is not 0: sigmoid(S - beta * log(-left / right)), Louizos eq. 12.
        return torch.stack([(gate.owner.scores - BETA * CLOSED).sigmoid().mean() for gate in gates]).mean()

    parts = _penalised(gates, units, all_open, schedule, config)
    weight = parts.pop("weight")
    penalties = {"penalty": lambda progress: weight(progress) * penalty()}
    return {**parts, "penalties": penalties, "projections": [draw_anew]}


def _penalised(
    gates: Sequence[ScoreGate], units: Sequence[Structure], natural: Any, schedule: Schedule, config: MovementConfig
) -> dict:
    """What soft and L0 share: with a goal, lambda by dual ascent and one exact selection at the end of the schedule."""
    parts = {
        "gates": gates,
        "scores": lambda: {gate.name: gate.scores() for gate in gates},
        "optimizers": _score_optimizer(config),
        "selection": natural,
        "weight": lambda progress: config.first_penalty,
    }
    if config.final_sparsity is None:
        return parts
    controller = DualAscent(config.first_penalty, _goal(config), schedule, gain=config.penalty_gain)
    exact = top_k(units, _goal(config), scope=config.scope, min_keep=config.min_keep)
    return parts | {
        "controller": controller,
        "selection": lambda scores, share: exact(scores, share) if share >= 1.0 else natural(scores, share),
        "fixed_from": config.end,
        "weight": lambda progress: controller.weight if progress < config.end else 0.0,
    }


def _goal(config: MovementConfig) -> Goal:
    assert config.goal is not None
    return config.goal


def _score_optimizer(config: MovementConfig) -> dict[str, Any]:
    if config.score_optimizer == "sgd":
        return {"scores": lambda scores: torch.optim.SGD(scores, lr=config.score_lr)}
    return {"scores": {"lr": config.score_lr, "weight_decay": 0.0}}


_VARIANT_PARTS = {"hard": _hard, "soft": _soft, "l0": _l0, "magnitude": _magnitude}

EXCUSES = {
    ("l0", "new_gates_change_nothing"): "hard concrete gates start 98 % open, as in the paper",
}

TINY = {
    "hard": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6),
    "hard_per_matrix": MovementConfig(final_sparsity=0.75, begin=0.2, end=0.6, scope="per_group"),
    "hard_block": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, structure="block", block_shape=(4, 4)),
    "hard_row": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, structure="row"),
    "hard_column": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, structure="column"),
    "hard_neuron": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, structure="neuron"),
    "hard_hybrid": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, structure="hybrid", block_shape=(4, 4)),
    "hard_sgd": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, score_optimizer="sgd"),
    "soft": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, variant="soft"),
    "l0": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, variant="l0", score_lr=0.1),
    "magnitude": MovementConfig(final_sparsity=0.5, begin=0.2, end=0.6, variant="magnitude"),
}
