"""`PruneTrainer`: a `Trainer` whose model is pruned while it trains. Each override is short and calls `Pruner`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PredictionOutput

from hf_prune.config import PruneConfig
from hf_prune.optimizer import PruneOptimizer
from hf_prune.parts.distillation import DistillConfig, Teacher
from hf_prune.parts.rounds import Build
from hf_prune.pruner import Pruner
from hf_prune.report.origin import describe_dataset, describe_training, scores
from hf_prune.report.reading import STATE_FILE
from hf_prune.trainer.callback import PruneCallback, check_arguments
from hf_prune.trainer.rounds import RoundsRun, rounds_complaint
from hf_prune.trainer.sharing import card_facts, check_hub_strategy, push
from hf_prune.types import PruneError, Report


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
        check_arguments(self.args, self.model_init)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise PruneError(
                "DeepSpeed and FSDP shard the weights that masks are made of, which PruneTrainer does not support; "
                "use DistributedDataParallel (plain `accelerate launch --multi_gpu`)."
            )
        self.pruner = self._attached_pruner(pruning, teacher, distillation)
        self._rounds = RoundsRun(self, teacher, distillation) if self.pruner.rounds else None
        if self._rounds is not None and (complaint := rounds_complaint(self.model, self.optimizer)):
            self.pruner.detach()
            raise PruneError(complaint)
        self._progress = PruneCallback(self.pruner)
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
        train = self._train_once if self._rounds is None else self._rounds.train
        output = train(resume_from_checkpoint, *args, **kwargs)
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
            return self._save_resumable(output_dir)
        folder = str(output_dir or self.args.output_dir)
        if self.args.should_save:
            self._save_compact(folder)
        if self.args.push_to_hub and not _internal_call and not self.pruner.attached:
            push(self, folder, "Model save", card_facts(self))  # of an unfinished run only the end is pushed

    def _save_resumable(self, folder: str | None) -> None:
        from hf_prune.checkpoint.names import renamed_on_disk

        super().save_model(folder, _internal_call=True)
        # Trainer resumes by the model's own names, and only warns of those that a checkpoint has under others.
        if self.args.should_save and isinstance(self.model, PreTrainedModel) and renamed_on_disk(self.model):
            self.model.save_pretrained(str(folder or self.args.output_dir), save_original_format=False)

    def _save_compact(self, folder: str) -> None:
        from hf_prune.checkpoint import save_pretrained

        model, report = self.pruner.baked() if self.pruner.attached else (self.model, self.report)
        save_pretrained(model, folder, report=report, processing_class=self.processing_class)
        torch.save(self.args, Path(folder) / "training_args.bin")
        self.state.save_to_json(str(Path(folder) / STATE_FILE))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of this run on the Hub, from process zero; one clear error where that cannot be."""
        from hf_prune.checkpoint.hub import create_repo

        check_hub_strategy(self.args)
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
            write_card(str(self.args.output_dir), card_facts(self, *args, **about))

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
        return push(
            self, str(self.args.output_dir), commit_message or "End of training", card_facts(self, **about), blocking,
            token=token, revision=revision, private=private,
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
