"""A run in rounds: one training after another, the folders of their models and checkpoints, where one goes on."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType, get_last_checkpoint
from transformers.training_args import OptimizerNames

from hf_prune.parts.distillation import DistillConfig, Teacher
from hf_prune.parts.rounds import Round
from hf_prune.report import chain
from hf_prune.report.reading import read_report
from hf_prune.types import PRUNING_FILE, PruneError, Report

if TYPE_CHECKING:
    from hf_prune.trainer.trainer import PruneTrainer


class RoundFolders:
    """`snapshot-k` is the model that round k starts from, `round-k` the output folder of round k, counted from 0."""

    def __init__(self, output_dir: str, count: int) -> None:
        self.output_dir, self.count = Path(output_dir), count

    def snapshot(self, index: int) -> Path:
        """The model that round `index` starts from."""
        return self.output_dir / f"snapshot-{index}"

    def round(self, index: int) -> Path:
        """Checkpoints and logs of round `index`."""
        return self.output_dir / f"round-{index}"

    def clear(self) -> None:
        """Remove what an earlier run has left, which this one must not take for its own."""
        for index in range(self.count):
            for folder in (self.snapshot(index), self.round(index)):
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, index: int, like: nn.Module) -> PreTrainedModel:
        """The model that round `index` started from; like: a model of its class."""
        assert isinstance(like, PreTrainedModel)
        return type(like).from_pretrained(self.snapshot(index))

    def restore(self, index: int, model: nn.Module) -> None:
        """Give `model` the shapes and weights of the one that round `index` started from."""
        from hf_prune.checkpoint.save import earlier_table, mark, narrow_table
        from hf_prune.graph.resize import resize

        assert isinstance(model, PreTrainedModel)
        saved = self.load(index, like=model)
        table, before = narrow_table(saved), earlier_table(model).narrow.buffers
        left = {
            name: tuple(before[name].index(entry) for entry in entries) if name in before else entries
            for name, entries in table.buffers.items()
        }
        table = replace(table, buffers=left)  # of those that `model` has
        resize(model, table)
        model.load_state_dict(saved.state_dict())
        mark(model, table)

    def report(self, index: int) -> Report | None:
        """What the rounds before `index` have done."""
        folder = self.snapshot(index)
        return read_report(folder) if (folder / PRUNING_FILE).is_file() else None

    def resume_point(self, resume: str | bool) -> tuple[int, str | None]:
        """Round to go on with, and the checkpoint in it, if there is one.

        resume: True for the newest checkpoint, or the folder of one.

        Raises:
            PruneError: there is nothing to go on from, or the folder is not a checkpoint of one of the rounds.
        """
        begun = [index for index in range(self.count) if self.snapshot(index).is_dir()]
        if not begun:
            raise PruneError(f"no snapshot of a run in rounds was found in {str(self.output_dir)!r} to resume from.")
        if resume is True:
            folder = self.round(begun[-1])
            return begun[-1], get_last_checkpoint(str(folder)) if folder.is_dir() else None
        for index in begun:
            if Path(str(resume)).resolve().parent == self.round(index).resolve():
                return index, str(resume)
        raise PruneError(
            f"resume_from_checkpoint={resume!r} is no checkpoint of a round in {str(self.output_dir)!r}; give True for "
            f"the newest one, or a folder such as {str(self.round(begun[-1]) / 'checkpoint-100')!r}."
        )


class RoundsRun:
    """The rounds of one method, made by one trainer, each with an optimizer and a scheduler of its own."""

    def __init__(
        self,
        trainer: PruneTrainer,
        teacher: Teacher | Sequence[Teacher] | None,
        distillation: DistillConfig | None,
    ) -> None:
        self.trainer, self.teacher, self.distillation = trainer, teacher, distillation
        self.whole, self.rounds = trainer.pruner, trainer.pruner.rounds
        self.begun = False

    def train(self, resume: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, of each round from the first, or from where `resume` says; the output of the last."""
        trainer, arguments = self.trainer, self.trainer.args
        folders = RoundFolders(str(arguments.output_dir), len(self.rounds))
        start, checkpoint = folders.resume_point(resume) if resume else (0, None)
        if self.begun:
            raise PruneError(
                "this PruneTrainer was stopped inside a round; make a new one with the model as it was in the "
                "beginning, and train(resume_from_checkpoint=True)."
            )
        self.begun = True
        self.whole.detach()
        assert trainer.model is not None
        if resume:
            folders.restore(start, trainer.model)
        else:
            self._save_snapshot(folders, 0)
        report = folders.report(start)
        try:
            for index, each in enumerate(self.rounds[start:], start):
                self._begin(each, folders, index)
                trainer.args = _with(arguments, output_dir=str(folders.round(index)), **each.arguments)
                set_seed(arguments.seed + index)  # so that a round goes the same way in a new process
                output = trainer._train_once(checkpoint, *args, **kwargs)
                assert trainer.report is not None
                report, checkpoint = chain(report, trainer.report) if report else trainer.report, None
                trainer.pruner.report = self.whole.as_own(report)
                if index + 1 < len(self.rounds):
                    self._save_snapshot(folders, index + 1)
        finally:
            trainer.args = arguments
        return output

    def _begin(self, each: Round, folders: RoundFolders, index: int) -> None:
        assert self.trainer.model is not None
        teacher, distillation = self.teacher, self.distillation
        if each.taught is not None:
            teacher, distillation = [folders.load(i, like=self.trainer.model) for i in range(index + 1)], each.taught
        elif teacher == "self":  # as it was in the beginning
            teacher = folders.load(0, like=self.trainer.model)
        self.trainer.pruner = self.trainer._attached_pruner(each.pruning, teacher, distillation, each.build)
        self.trainer._progress.pruner = self.trainer.pruner

    def _save_snapshot(self, folders: RoundFolders, index: int) -> None:
        if self.trainer.args.should_save:
            if index == 0:
                folders.clear()
            self.trainer._save_compact(str(folders.snapshot(index)))
        self.trainer.accelerator.wait_for_everyone()


def rounds_complaint(model: Any, optimizer: Any) -> str | None:
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
