"""Where a run in rounds keeps its models and checkpoints, and where it goes on after it was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from hf_prune.report.reading import read_report
from hf_prune.types import PRUNING_FILE, PruneError, Report


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
        from hf_prune.checkpoint.save import mark, narrow_table
        from hf_prune.graph.resize import resize

        saved = self.load(index, like=model)
        table = narrow_table(saved)
        resize(model, table)
        model.load_state_dict(saved.state_dict())
        assert isinstance(model, PreTrainedModel)
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
