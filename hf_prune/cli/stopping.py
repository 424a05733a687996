"""Ctrl-C while training: finish the step, write a checkpoint, stop; the same command goes on with --resume."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import typer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnInterrupt(TrainerCallback):
    """Has the run end after the step in which Ctrl-C came, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C while the run lasts."""
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # A launcher of several processes passes on what the terminal has already sent to each of them.
        if self.asked and not dist.is_initialized():
            raise KeyboardInterrupt("stopped at once; --resume goes on from the last checkpoint.")
        if not self.asked:
            typer.echo("hf-prune: stopping after this step; once more stops at once.", err=True)
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint once any process was interrupted."""
        if dist.is_initialized():
            asked = torch.tensor(float(self.asked), device=args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.asked = bool(asked)
        control.should_save |= self.asked

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop, once the checkpoint is whole."""
        if self.asked and state.global_step < state.max_steps:
            if not state.is_world_process_zero:
                raise KeyboardInterrupt("stopped.")
            program = "accelerate launch -m hf_prune" if dist.is_initialized() else "hf-prune"
            again = [word for word in sys.argv[1:] if word != "--overwrite"]
            again += [] if "--resume" in again else ["--resume"]
            raise KeyboardInterrupt(
                f"stopped after step {state.global_step} of {state.max_steps}. To go on from there:\n"
                f"    {program} {shlex.join(again)}"
            )
