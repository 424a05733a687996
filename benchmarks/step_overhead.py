"""What movement pruning adds to a training step and to memory, against the stock Trainer in the same process.

    python benchmarks/step_overhead.py            # all-MiniLM-L6-v2, batch 32 x 64 tokens, one thread
    python benchmarks/step_overhead.py --quick    # a tiny model: shows that it runs, not what it costs

Both trainers leave the embeddings frozen, so that they train the same weights. Steps are timed from the forward pass to
the refreshed masks, in interleaved rounds, the first step of a round left out; the ratio is one of medians. Memory is
the highest resident size of a process that trains, less that of a process that trains without pruning, in units of the
pruned weights' bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from cells import CACHE, RESULTS, Store
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_prune import MovementConfig, PruneTrainer
from hf_prune.demo_data import minilm_path
from hf_prune.tiny_models import tiny_text_model

ROUNDS, STEPS = 6, 5
VARIANTS = ("hard", "soft", "l0", "magnitude")
GOALS = {"step ratio of hard": 1.25, "memory of hard": 5.5}


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, whatever other callbacks do at its end included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def model_and_rows(quick: bool) -> tuple[torch.nn.Module, Dataset]:
    pretrained = AutoModelForSequenceClassification.from_pretrained
    model = tiny_text_model() if quick else pretrained(minilm_path(), num_labels=3)
    for name, parameter in model.named_parameters():
        if "_embeddings." in name:
            parameter.requires_grad_(False)
    tokens, count = (12, 64) if quick else (64, 32 * STEPS)
    ids = torch.randint(1, model.config.vocab_size, (count, tokens), generator=torch.Generator().manual_seed(0))
    return model, Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})


def train(kind: str, quick: bool) -> list[float]:
    """Seconds of each of a few steps, the first left out. `kind`: "stock" or a variant of movement pruning."""
    model, rows = model_and_rows(quick)
    arguments = TrainingArguments(
        str(CACHE / "step_overhead"),
        max_steps=STEPS,
        per_device_train_batch_size=8 if quick else 32,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    common = {"model": model, "args": arguments, "train_dataset": rows}
    if kind == "stock":
        trainer = Trainer(**common)
    else:
        trainer = PruneTrainer(**common, pruning=MovementConfig(final_sparsity=0.9, variant=kind, begin=0.0, end=0.4))
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds[1:]


def pruned_bytes(quick: bool) -> int:
    model, _ = model_and_rows(quick)
    return sum(4 * p.numel() for n, p in model.named_parameters() if "encoder" in n and p.ndim == 2)


def peak_memory(kind: str, quick: bool) -> int:
    """Highest resident bytes of a fresh process that trains `kind`."""
    command = [sys.executable, __file__, "--peak-of", kind, *(["--quick"] if quick else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(quick: bool) -> dict[str, Any]:
    # First, while this process is small: a child's record of its highest size begins with its parent's size.
    memory, size = {kind: peak_memory(kind, quick) for kind in ("stock", "hard")}, pruned_bytes(quick)
    seconds: dict[str, list[float]] = {kind: [] for kind in ("stock", *VARIANTS)}
    for _ in range(2 if quick else ROUNDS):
        for kind, values in seconds.items():
            values += train(kind, quick)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    spread = {kind: statistics.quantiles(values, n=4) for kind, values in seconds.items()}
    return {
        "step_seconds": {kind: {"median": m, "quartiles": spread[kind]} for kind, m in medians.items()},
        "step_ratio": {kind: medians[kind] / medians["stock"] for kind in VARIANTS},
        "pruned_weights_bytes": size,
        "extra_memory_of_hard": (memory["hard"] - memory["stock"]) / size,
        "goals": GOALS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        train(options.peak_of, options.quick)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    result = measure(options.quick)
    Store(CACHE / "step_overhead_quick.json" if options.quick else RESULTS / "step_overhead.json").write(**result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
