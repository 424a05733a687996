"""Snapshots of iterative pruning as an ensemble of teachers, KESI (Le, Vo & Thoai 2020, arXiv 2006.11487).

Idea      prune in rounds, retrain each round under a learning rate that restarts high, so that the models at the ends
          of the rounds are unlike each other, and keep them: they cost nothing more. In a last round the most pruned
          one learns from the mean of all of them.
Equations loss = T^2 mean_k KL(p_k || q), of softmaxes at temperature T, has the gradient T (q - mean_k p_k)
          -> `distillation.Distiller`, which takes the mean of probabilities; one cycle from max / 10 over max after a
          tenth of the round to max / 1000 -> `_one_cycle`.
Differs   Built from the authors' code. Any method prunes in the rounds (`inner`); theirs are L1 filter norms at given
          shares a stage and global magnitude. Each round keeps the same share of what the round before it left; of
          multiply-adds, parameters, bytes and units, what rounding leaves below the share in a round stays below it. A
          round prunes along the inner method's schedule between `begin` and `end`, by default in the tenth of it in
          which the rate rises, where the authors prune before it. The rate rises linearly, not by a cosine, and
          momentum does not cycle. `round_lr` is the user's `learning_rate` where it is not given (the paper: SGD at
          0.1), and lengths are those of the user's arguments, which count for one round. The loss is a mean over rows,
          the authors' one over rows and classes. Zeros are held by a mask, and not by zero gradients alone.
Related   `magnitude` is the default `inner`, every other method can be; `DistillConfig` with a list of teachers is the
          last round alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_prune import methods
from hf_prune.config import GOALS as ALL_GOALS
from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.parts import targets
from hf_prune.parts.distillation import DistillConfig
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.rounds import Round, hold, holding_zeros
from hf_prune.types import Paper

PAPER = Paper(
    title=(
        "Paying more attention to snapshots of Iterative Pruning: Improving Model Compression via Ensemble Distillation"
    ),
    authors="Duong H. Le, Trung-Nhan Vo, Nam Thoai",
    year=2020,
    arxiv="2006.11487",
    status="reconstruction",
    bibtex="""@inproceedings{le2020paying,
  title     = {Paying more attention to snapshots of Iterative Pruning: Improving Model Compression via Ensemble
               Distillation},
  author    = {Le, Duong H. and Vo, Trung-Nhan and Thoai, Nam},
  booktitle = {British Machine Vision Conference},
  year      = {2020}
}""",
)
NEEDS_TRAINING = True
GOALS = targets.GOALS
TINY_MODEL = "image"

CYCLES = ("one_cycle", "constant")
OWN = ("include", "exclude", "structure", "scope", "min_keep", "width_multiple", "seed")
"""Shared fields that reach the inner method where they are set; `begin` and `end` always do."""


@dataclass(frozen=True)
class SnapshotEnsembleConfig(PruneConfig):
    """`rounds` runs that prune and retrain and one that distils, each as long as the training arguments say.

    `PruneTrainer` runs them; in a loop of your own, make one `Pruner` for each of `Recipe.rounds`. A `Pruner` with this
    config itself prunes as `inner` does, in one run. Gradient clipping and the rest of the arguments are the user's.
    """

    method = "snapshot_ensemble"
    rounds_widths = True

    structure: str = ""  # what the inner method takes; empty: its default
    end: float = 0.1  # share of each round after which the inner method has pruned
    inner: str = "magnitude"  # method that prunes within the rounds
    inner_options: Mapping[str, Any] = field(default_factory=dict)  # that method's own settings
    rounds: int = 5  # how often to prune and retrain
    cycle: str = "one_cycle"  # learning rate of each: "one_cycle", or "constant", the paper's baseline at a small rate
    round_lr: float | None = None  # highest learning rate of each round; None: the training arguments' own
    alpha: float = 1.0  # share of the teachers' term in the last round against the labels; 0: labels alone
    temperature: float = 5.0  # of the teachers' and the student's softmax
    distill_lr: float = 1e-3  # highest learning rate of the last round, which is Adam's

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("cycle", self.cycle, CYCLES)
        require_range("rounds", self.rounds, 1, math.inf, closed_right=False)
        for name in ("round_lr", "distill_lr", "temperature"):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("alpha", self.alpha, 0.0, 1.0)
        if self.goal is None or self.goal.name not in GOALS:
            raise ValueError(f"SnapshotEnsembleConfig needs one goal of {', '.join(GOALS)}.")
        if self.inner == self.method:
            raise ValueError("inner must be a method that prunes, got 'snapshot_ensemble' itself.")
        if self.goal.name == "final_sparsity" and self.structure in ("neuron", "hybrid"):
            raise ValueError(
                f"structure {self.structure!r} removes whole neurons, after which a share of all weights means another "
                "share of those left; set 'element', 'block', 'row' or 'column', or a target_* goal."
            )
        self.inner_config(self.rounds)

    def inner_config(self, done: int) -> PruneConfig:
        """The inner method's config for the run after which `done` rounds are done; for 0, the whole way in one."""
        assert self.goal is not None
        kept = self.goal.kept(1.0)
        if done and self.goal.name == "final_sparsity":  # of the dense model's weights, zeros among them
            kept **= done / self.rounds
        elif done:  # of what the round before has left
            kept **= 1.0 / self.rounds
        value = 1.0 - kept if self.goal.name == "final_sparsity" else kept
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        shared = {name: getattr(self, name) for name in OWN if getattr(self, name) != defaults[name]}
        own = {**shared, "begin": self.begin, "end": self.end, **self.inner_options, self.goal.name: value}
        for name in ALL_GOALS:
            if name in self.inner_options:
                raise ValueError(f"inner_options must not hold the goal {name}; set it beside them.")
        return methods.load(self.inner).Config.from_dict(own)


Config = SnapshotEnsembleConfig


def build(model: nn.Module, graph: Any, config: SnapshotEnsembleConfig) -> Recipe:
    """The inner method on the whole way to the goal, and beside it the rounds that make the way."""
    recipe: Recipe = methods.load(config.inner).build(model, graph, config.inner_config(0))
    return dataclasses.replace(recipe, rounds=_rounds(config))


def _rounds(config: SnapshotEnsembleConfig) -> list[Round]:
    build_first = methods.load(config.inner).build
    build_next = holding_zeros(build_first)
    rate = {} if config.round_lr is None else {"learning_rate": config.round_lr}
    schedule = {"one_cycle": _one_cycle(), "constant": {"lr_scheduler_type": "constant", "warmup_steps": 0}}
    arguments = {**schedule[config.cycle], **rate}
    prune = [
        Round(config.inner_config(done), build_first if done == 1 else build_next, arguments)
        for done in range(1, config.rounds + 1)
    ]
    taught = DistillConfig(temperature=config.temperature, alpha=config.alpha) if config.alpha else None
    adam = {"optim": "adamw_torch", "weight_decay": 0.0, "learning_rate": config.distill_lr}
    return [*prune, Round(prune[-1].pruning, hold, {**_one_cycle(), **adam}, taught)]


def _one_cycle() -> dict[str, Any]:
    """Training arguments for a rate that starts at a tenth, peaks after a tenth of the steps, ends at a thousandth."""
    return {
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"warmup_lr_rate": 0.1, "min_lr_rate": 1e-3},
        "warmup_steps": 0.1,
    }


TINY = {
    "element": SnapshotEnsembleConfig(final_sparsity=0.6, begin=0.2, end=0.6),
    "units": SnapshotEnsembleConfig(target_units=0.5, scope="per_group", begin=0.2, end=0.6),
    "resrep": SnapshotEnsembleConfig(
        target_params=0.7, inner="resrep", end=1.0, inner_options={"mask_interval_steps": 2, "begin_granularity": 1}
    ),
}
