"""What happens to the pruner as training goes on, and training arguments under which it could not."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.pruner import Pruner
from hf_prune.types import PruneError


class PruneCallback(TrainerCallback):
    """Moves the pruner along with the optimizer steps."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse a schedule that the run is too short for; move to the state that it begins or goes on with."""
        _check_warmup(args, state.max_steps)
        self.pruner.check_schedule(state.max_steps)
        self.pruner.step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move on by one optimizer step."""
        self.pruner.step(state.global_step, state.max_steps)
        if not self.pruner.at_goal:
            # A checkpoint that is not sparse enough yet must never count as the best one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """Tell the pruner how the model does."""
        if self.pruner.attached and metrics:
            self.pruner.observe(metrics)


def check_arguments(args: TrainingArguments, model_init: Any) -> None:
    """Raise where the model that is pruned would not be the one that trains."""
    if model_init is not None:
        raise PruneError("PruneTrainer prunes the model it is given; pass model= instead of model_init=.")
    if args.n_gpu > 1:
        raise PruneError(
            f"{args.n_gpu} GPUs in one process train on copies of the model, which masks do not follow; "
            "start one process for each GPU with `accelerate launch`, or show this one a single GPU."
        )


def _check_warmup(args: TrainingArguments, max_steps: int) -> None:
    warmup = args.get_warmup_steps(max_steps)
    if warmup >= max_steps:
        raise PruneError(
            f"the learning-rate warm-up takes {warmup} steps and training only {max_steps}; "
            "lower warmup_steps or train longer."
        )
