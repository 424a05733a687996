"""`PruneTrainer`: a `Trainer` whose model is pruned while it trains. Each override is short and calls `Pruner`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import HubStrategy, PredictionOutput, SchedulerType
from transformers.training_args import OptimizerNames

from hf_prune.config import PruneConfig
from hf_prune.optimizer import PruneOptimizer
from hf_prune.parts.distillation import DistillConfig, Teacher
from hf_prune.parts.rounds import Build, Round
from hf_prune.pruner import Pruner
from hf_prune.report import chain
from hf_prune.report.origin import describe_dataset, describe_training, scores
from hf_prune.report.reading import STATE_FILE
from hf_prune.rounds import RoundFolders
from hf_prune.types import PruneError, Report

if TYPE_CHECKING:
    from hf_prune.report.card import About

FINAL_HUB_STRATEGY = HubStrategy.END


class PruneTrainer(Trainer):
    """Train and prune; `train()` ends with a plain, compact `self.model`.

    Args:
        pruning: the method and its settings.
        teacher: a model, a folder, a Hub id or "self" to distil from, or several of them; None for none.
        distillation: weights of the distillation terms; the defaults where only `teacher` is given.
        *args, **kwargs: as for `transformers.Trainer`.

    Raises:
        PruneError: the arguments and the method do not fit; the model is left as it was.
    """

    def __init__(
        self,
        *args: Any,
        pruning: PruneConfig,
        teacher: Teacher | Sequence[Teacher] | None = None,
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
        self.pruner = self._attached_pruner(pruning, teacher, distillation)
        self._teacher, self._distillation, self._rounds = teacher, distillation, self.pruner.rounds
        if self._rounds and (complaint := _rounds_complaint(self.model, self.optimizer)):
            self.pruner.detach()
            raise PruneError(complaint)
        self._progress = _PruneCallback(self.pruner)
        self.add_callback(self._progress)

    def _attached_pruner(
        self,
        pruning: PruneConfig,
        teacher: Teacher | Sequence[Teacher] | None,
        distillation: DistillConfig | None,
        build: Build | None = None,
    ) -> Pruner:
        assert self.model is not None  # Trainer itself refuses to be made without one
        several = isinstance(self.eval_dataset, dict)
        pruner = Pruner(
            self.model,
            pruning,
            example_inputs=self._example_inputs if self.train_dataset is not None else None,
            data=self._calibration_batches if self.train_dataset is not None else None,
            evaluate=None if self.eval_dataset is None or several else self._validation_metrics,
            teacher=teacher,
            distillation=distillation,
            tokenizer=self.processing_class,
            build=build,
        )
        pruner.attach()
        if self.args.torch_compile:
            pruner.keep_whole("torch_compile would compile the model anew at each cut")
        return pruner

    @property
    def report(self) -> Report | None:
        """What the finished run did; None before `train()` has ended."""
        return self.pruner.report

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; the model is finalized at the end, after the best checkpoint was loaded.

        Methods in rounds write each round to a folder of its own in `output_dir`, and resume inside one.
        """
        if not self.pruner.attached:
            raise PruneError(
                "this PruneTrainer has finished its run; use transformers.Trainer to fine-tune the pruned model, "
                "or a new PruneTrainer to prune it further."
            )
        if self._rounds:
            if not self.pruner.rounds:
                raise PruneError(
                    "this PruneTrainer was stopped inside a round; make a new one with the model as it was in the "
                    "beginning, and train(resume_from_checkpoint=True)."
                )
            output = self._train_rounds(resume_from_checkpoint, *args, **kwargs)
        else:
            output = self._train_once(resume_from_checkpoint, *args, **kwargs)
        if self.args.push_to_hub:
            self.save_model()
        return output

    def _train_once(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        self._complete(self.pruner.finalize())
        # The optimizer and every wrapper still hold parameters that the plain model no longer has.
        self.optimizer, self.lr_scheduler, self.model_wrapped = None, None, self.pruner.model
        self.accelerator.free_memory()
        return output

    def _complete(self, report: Report) -> None:
        """Add to the finished run's report what only the trainer knows."""
        distillation = self.pruner.distillation
        training = describe_training(self, asdict(distillation) if distillation is not None else None)
        self.pruner.report = replace(report, training=training)
        if self.train_dataset is not None:
            self._note("train", self.train_dataset, {})

    def _note(self, prefix: str, dataset: Any, metrics: Mapping[str, float]) -> None:
        """Put scores of the finished model, and the data that they come from, into the report."""
        if (report := self.report) is not None:
            self.pruner.report = replace(
                report,
                metrics={**report.metrics, **scores(metrics, prefix)},
                datasets={**report.datasets, prefix: describe_dataset(dataset)},
            )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; scores of the finished model go into its report."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast(dict[str, Any], self.eval_dataset)[dataset]
        if not isinstance(dataset, dict):  # of several, each comes here by itself
            self._note(metric_key_prefix, dataset, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As `Trainer.predict`; scores of the finished model go into its report."""
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        self._note(metric_key_prefix, test_dataset, output.metrics or {})
        return output

    def _train_rounds(self, resume: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        whole, arguments, rounds = self.pruner, self.args, self._rounds
        folders = RoundFolders(str(arguments.output_dir), len(rounds))
        start, checkpoint = folders.resume_point(resume) if resume else (0, None)
        whole.detach()
        assert self.model is not None
        if resume:
            folders.restore(start, self.model)
        else:
            self._save_snapshot(folders, 0)
        report = folders.report(start)
        try:
            for index, each in enumerate(rounds[start:], start):
                self._begin_round(each, folders, index)
                self.args = _with(arguments, output_dir=str(folders.round(index)), **each.arguments)
                set_seed(arguments.seed + index)  # so that a round goes the same way in a new process
                output = self._train_once(checkpoint, *args, **kwargs)
                assert self.report is not None
                report, checkpoint = chain(report, self.report) if report else self.report, None
                self.pruner.report = whole.as_own(report)
                if index + 1 < len(rounds):
                    self._save_snapshot(folders, index + 1)
        finally:
            self.args = arguments
        return output

    def _begin_round(self, each: Round, folders: RoundFolders, index: int) -> None:
        assert self.model is not None
        teacher, distillation = self._teacher, self._distillation
        if each.taught is not None:
            teacher, distillation = [folders.load(i, like=self.model) for i in range(index + 1)], each.taught
        elif teacher == "self":  # as it was in the beginning
            teacher = folders.load(0, like=self.model)
        self.pruner = self._attached_pruner(each.pruning, teacher, distillation, each.build)
        self._progress.pruner = self.pruner

    def _save_snapshot(self, folders: RoundFolders, index: int) -> None:
        if self.args.should_save:
            if index == 0:
                folders.clear()
            self._save_compact(str(folders.snapshot(index)))
        self.accelerator.wait_for_everyone()

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
        folder = str(output_dir or self.args.output_dir)
        if self.args.should_save:
            self._save_compact(folder)
        if self.args.push_to_hub and not _internal_call and not self.pruner.attached:
            self._push(folder, "Model save", self._about())  # of an unfinished run only the end is pushed

    def _save_compact(self, folder: str) -> None:
        from hf_prune.checkpoint import save_pretrained

        model, report = self.pruner.baked() if self.pruner.attached else (self.model, self.report)
        save_pretrained(model, folder, report=report, processing_class=self.processing_class)
        torch.save(self.args, Path(folder) / "training_args.bin")
        self.state.save_to_json(str(Path(folder) / STATE_FILE))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of this run on the Hub, from process zero; one clear error where that cannot be."""
        from hf_prune.checkpoint.hub import create_repo

        _check_hub_strategy(self.args)
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            private = self.args.hub_private_repo if private is None else private
            repo_id: Any = create_repo(name, private=private, token=token or self.args.hub_token)
            self.hub_model_id = repo_id
            self.push_in_progress = None

    def create_model_card(self, *args: Any, **about: Any) -> None:
        """Write the finished model and its card to the output folder; arguments as for `Trainer.create_model_card`.

        What is ours to know (task, name and arguments of the data) comes from the run, whatever is given for it.
        """
        from hf_prune.report.card import write_card

        self._require_finished("create_model_card")
        if self.is_world_process_zero():
            self._save_compact(str(self.args.output_dir))
            write_card(str(self.args.output_dir), self._about(*args, **about))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **about: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`, once the model is finished: saved to the output folder, and pushed in one commit.

        about: as for `create_model_card`.
        """
        self._require_finished("push_to_hub")
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if self.is_world_process_zero():
            self._save_compact(str(self.args.output_dir))
        return self._push(
            str(self.args.output_dir), commit_message or "End of training", self._about(**about), blocking,
            token=token, revision=revision, private=private,
        )  # fmt: skip

    def _push(self, folder: str, message: str, about: About, blocking: bool = True, **given: Any) -> Any:
        """Push a saved folder; the training arguments say what `given` (token, revision, private) leaves out."""
        from hf_prune.checkpoint.hub import push_folder

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        usual = {
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "private": self.args.hub_private_repo,
        }
        options = usual | {name: value for name, value in given.items() if value is not None}
        push = partial(push_folder, folder, str(self.hub_model_id), commit_message=message, about=about, **options)
        if not blocking:
            return HfApi().run_as_future(push)
        try:
            return push()
        except PruneError as error:
            again = f"`hf-prune push {folder} {self.hub_model_id}`"
            raise PruneError(f"{error} The model is safe in {folder!r}; {again} pushes it.") from error

    def _about(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: str | list[str] | None = None,
        dataset: Any = None,
        dataset_args: Any = None,
    ) -> About:
        """What the card says beside the report, under the names that `Trainer.create_model_card` has for it."""
        from hf_prune.report.card import About

        return About(
            name=model_name, base_model=finetuned_from, datasets=_listed(dataset_tags), license=license,
            language=_listed(language), tags=(*_listed(tags), *(getattr(self.model, "model_tags", None) or ())),
        )  # fmt: skip

    def _require_finished(self, call: str) -> None:
        if self.pruner.attached:
            raise PruneError(
                f"the model is not finished: its masks are still being trained. Call {call} after train() has ended."
            )

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


def _listed(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


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


def _check_hub_strategy(args: TrainingArguments) -> None:
    if args.push_to_hub and args.hub_strategy != FINAL_HUB_STRATEGY:
        raise PruneError(
            f"hub_strategy={HubStrategy(args.hub_strategy).value!r} would push checkpoints that only this run "
            f"can read; set hub_strategy={FINAL_HUB_STRATEGY.value!r}."
        )


def _rounds_complaint(model: Any, optimizer: Any) -> str | None:
    """Why the model cannot be trained in rounds, if so."""
    if not isinstance(model, PreTrainedModel):
        return f"a method in rounds saves and loads models, so it needs a PreTrainedModel, got {type(model).__name__}."
    if optimizer is not None:
        return (
            "each round has an optimizer of its own; instead of optimizers=(...), set optim and learning_rate in the "
            "training arguments."
        )
    return None


def _with(arguments: TrainingArguments, **changes: Any) -> TrainingArguments:
    """A copy with other values, in the types that `TrainingArguments` gives them."""
    kinds = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
    copied = copy.copy(arguments)
    for name, value in changes.items():
        if not hasattr(copied, name):
            raise PruneError(f"a round sets the training argument {name!r}, which TrainingArguments does not have.")
        setattr(copied, name, kinds[name](value) if name in kinds else value)
    return copied


def _check_warmup(args: TrainingArguments, max_steps: int) -> None:
    warmup = args.get_warmup_steps(max_steps)
    if warmup >= max_steps:
        raise PruneError(
            f"the learning-rate warm-up takes {warmup} steps and training only {max_steps}; "
            "lower warmup_steps or train longer."
        )
