"""`PruneTrainer`: a `Trainer` whose model is pruned while it trains. Each override is short and calls `Pruner`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_prune.config import PruneConfig
from hf_prune.optimizer import PruneOptimizer
from hf_prune.parts.distillation import DistillConfig
from hf_prune.pruner import Pruner
from hf_prune.types import PruneError, Report

FINAL_HUB_STRATEGY = HubStrategy.END


class PruneTrainer(Trainer):
    """Train and prune; `train()` ends with a plain, compact `self.model`.

    Args:
        pruning: the method and its settings.
        teacher: a model, a folder, a Hub id or "self" to distil from; None for none.
        distillation: weights of the distillation terms; the defaults where only `teacher` is given.
        *args, **kwargs: as for `transformers.Trainer`.

    Raises:
        PruneError: the arguments and the method do not fit; the model is left as it was.
    """

    def __init__(
        self,
        *args: Any,
        pruning: PruneConfig,
        teacher: nn.Module | str | Path | None = None,
        distillation: DistillConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Trainer leaves a loss undivided by accumulation steps where the model's forward takes keywords, trusting it to
        # use `num_items_in_batch`; BERT's classification heads take it and ignore it. A mean per batch is always right.
        self.model_accepts_loss_kwargs = False
        _check_arguments(self.args, self.model_init)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise PruneError(
                "DeepSpeed and FSDP shard the weights that masks are made of, which PruneTrainer does not support; "
                "use DistributedDataParallel (plain `accelerate launch --multi_gpu`)."
            )
        assert self.model is not None  # Trainer itself refuses to be made without one
        several = isinstance(self.eval_dataset, dict)
        self.pruner = Pruner(
            self.model,
            pruning,
            example_inputs=self._example_inputs if self.train_dataset is not None else None,
            data=self._calibration_batches if self.train_dataset is not None else None,
            evaluate=None if self.eval_dataset is None or several else self._validation_metrics,
            teacher=teacher,
            distillation=distillation,
            tokenizer=self.processing_class,
        )
        self.pruner.attach()
        if self.args.torch_compile:
            self.pruner.keep_whole("torch_compile would compile the model anew at each cut")
        self.add_callback(_PruneCallback(self.pruner))

    @property
    def report(self) -> Report | None:
        """What the finished run did; None before `train()` has ended."""
        return self.pruner.report

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; the model is finalized at the end, after the best checkpoint was loaded."""
        if not self.pruner.attached:
            raise PruneError(
                "this PruneTrainer has finished its run; use transformers.Trainer to fine-tune the pruned model, "
                "or a new PruneTrainer to prune it further."
            )
        output = super().train(*args, **kwargs)
        self.pruner.finalize()
        # The optimizer and every wrapper still hold parameters that the plain model no longer has.
        self.optimizer, self.lr_scheduler, self.model_wrapped = None, None, self.pruner.model
        self.accelerator.free_memory()
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, wrapped once."""
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, PruneOptimizer):
            return optimizer
        known = len(optimizer.param_groups)
        self.optimizer = self.pruner.wrap(optimizer)
        if self.lr_scheduler is not None and len(self.optimizer.param_groups) != known:
            raise PruneError(
                "the learning-rate scheduler was made before the method added parameters of its own to the optimizer; "
                "pass optimizers=(optimizer, None) and set lr_scheduler_type."
            )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Task loss, distillation and penalties while training; Trainer's loss elsewhere."""
        if not (model.training and self.pruner.attached):
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        # A loss function of the user's own divides by all accumulated items, and Trainer then divides nothing.
        scale = 1.0 / self.current_gradient_accumulation_steps if self.compute_loss_func is not None else 1.0
        if self.pruner.has_passes:
            loss, outputs = scale * self.pruner.batch_loss(model, inputs), {}
        else:
            student_inputs = {**inputs, **self.pruner.student_inputs}
            task_loss, outputs = super().compute_loss(model, student_inputs, True, *args, **kwargs)
            loss = self.pruner.loss(task_loss, outputs, inputs, scale=scale)
        if self.args.fp16 is False and not bool(torch.isfinite(loss)):
            raise PruneError(
                f"the loss is {loss.item()} at step {self.state.global_step}; training has diverged. "
                "Lower learning_rate or score_lr, or resume from the last checkpoint in "
                f"{self.args.output_dir!r}."
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's logs, with sparsity and loss terms beside the loss."""
        if self.pruner.attached and "loss" in logs:
            logs = {**logs, **self.pruner.logs()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The compact model. Trainer's own calls inside the run write the resumable state instead."""
        if self.pruner.attached and _internal_call:
            return super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self._save_compact(str(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_compact(self, folder: str) -> None:
        from hf_prune.checkpoint import save_pretrained

        model, report = self.pruner.baked() if self.pruner.attached else (self.model, self.report)
        save_pretrained(model, folder, report=report, processing_class=self.processing_class)
        torch.save(self.args, Path(folder) / "training_args.bin")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`, once the model is finished."""
        if self.pruner.attached:
            raise PruneError(
                "the model is not finished: its masks are still being trained. "
                "Call push_to_hub after train() has ended."
            )
        return super().push_to_hub(*args, **kwargs)

    def _example_inputs(self) -> dict[str, Any]:
        """One collated batch without labels, for methods that trace the model."""
        loader = self.get_train_dataloader()
        # Not through accelerate's wrapper, which would take this for the epoch under way; and the order in which the
        # run will read its rows must not depend on whether a method looks at the model's graph.
        with torch.random.fork_rng(devices=()):
            batch = self._prepare_inputs(next(iter(getattr(loader, "base_dataloader", loader))))
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "labels"}

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """The training rows, shuffled the same way at every look; each process has its share of them.

        The pruner puts torch's random state back.
        """
        torch.default_generator.manual_seed(self.args.seed)
        loader = self.get_train_dataloader()
        return map(self._prepare_inputs, getattr(loader, "base_dataloader", loader))

    def _validation_metrics(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the validation rows, without the logs and callbacks of `evaluate`."""
        output = self.evaluation_loop(self.get_eval_dataloader(), "Validation", metric_key_prefix="eval")
        return dict(output.metrics or {})


class _PruneCallback(TrainerCallback):
    """Moves the pruner along with the optimizer steps."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _check_warmup(args, state.max_steps)
        self.pruner.check_schedule(state.max_steps)
        self.pruner.step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.pruner.step(state.global_step, state.max_steps)
        if not self.pruner.at_goal:
            # A checkpoint that is not sparse enough yet must never count as the best one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        if self.pruner.attached and metrics:
            self.pruner.observe(metrics)


def _check_arguments(args: TrainingArguments, model_init: Any) -> None:
    if model_init is not None:
        raise PruneError("PruneTrainer prunes the model it is given; pass model= instead of model_init=.")
    if args.n_gpu > 1:
        raise PruneError(
            f"{args.n_gpu} GPUs in one process train on copies of the model, which masks do not follow; "
            "start one process for each GPU with `accelerate launch`, or show this one a single GPU."
        )
    if args.push_to_hub and args.hub_strategy != FINAL_HUB_STRATEGY:
        raise PruneError(
            f"hub_strategy={HubStrategy(args.hub_strategy).value!r} would push checkpoints that only this run "
            f"can read; set hub_strategy={FINAL_HUB_STRATEGY.value!r}."
        )


def _check_warmup(args: TrainingArguments, max_steps: int) -> None:
    warmup = args.get_warmup_steps(max_steps)
    if warmup >= max_steps:
        raise PruneError(
            f"the learning-rate warm-up takes {warmup} steps and training only {max_steps}; "
            "lower warmup_steps or train longer."
        )
