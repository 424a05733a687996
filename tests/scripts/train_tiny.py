"""Prunes a tiny BERT in the way its arguments say and writes what a test compares; run in processes of its own."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments

from hf_prune import DistillConfig, MovementConfig, PruneTrainer
from hf_prune.tiny_models import tiny_text_model

ROWS = 64


class Kill(TrainerCallback):
    """Ends the process as a power cut would, in the middle of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (ROWS, 8), generator=generator)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})


def train(
    folder: Path,
    pruning: dict[str, Any],
    training: dict[str, Any],
    *,
    dropout: float = 0.0,
    kill_at: int | None = None,
    resume: bool = False,
    world_size: int = 1,
) -> dict[str, torch.Tensor]:
    """Final weights, and the masks and scores just before they were folded."""
    defaults = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.05}
    arguments = TrainingArguments(str(folder), **{**defaults, "logging_steps": 1, "save_strategy": "no", **training})
    trainer = PruneTrainer(
        model=tiny_text_model(hidden_dropout_prob=dropout).double(),
        args=arguments,
        train_dataset=rows(),
        pruning=MovementConfig(**{"final_sparsity": 0.6, "begin": 0.1, "end": 0.7, "score_lr": 0.5, **pruning}),
        teacher="self",
        distillation=DistillConfig(alpha=0.5),
    )
    assert trainer.accelerator.num_processes == world_size, trainer.accelerator.num_processes
    if kill_at is not None:
        trainer.add_callback(Kill(kill_at))
    seen: dict[str, torch.Tensor] = {}
    finalize = trainer.pruner.finalize

    def remember_then_finalize() -> Any:
        seen.update({f"keep.{name}": keep.clone() for name, keep in trainer.pruner.plan.items()})
        learned = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if name.endswith("scores")}
        seen.update(learned)
        return finalize()

    trainer.pruner.finalize = remember_then_finalize
    trainer.train(resume_from_checkpoint=True if resume else None)
    return {**{f"weight.{name}": value.detach().clone() for name, value in trainer.model.state_dict().items()}, **seen}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads, help="arguments of `train`")
    options = parser.parse_args()
    result = train(options.folder, **options.settings)
    save_file(result, options.folder / f"rank{os.environ.get('RANK', '0')}.safetensors")


if __name__ == "__main__":
    main()
