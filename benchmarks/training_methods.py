"""Methods that shape training, each beside what its paper compares it with, at half of the channels.

    python benchmarks/training_methods.py            # all cells; finished ones stay, so it can be stopped and resumed
    python benchmarks/training_methods.py --quick    # few rows and steps, one seed, minutes: shows that it runs
    python benchmarks/training_methods.py --table    # only print what is there

Fashion-MNIST: half of the units of every width of a small ResNet, streams among them, uniformly. Movie sentiment: four
fifths of the weights of each encoder layer of MiniLM go. Every row from a dense model trains for the same number of
optimizer steps; the snapshot rows divide theirs into five rounds and a sixth. Nothing is tuned, so test rows count for
every cell. GReg-1 and the removal at once take the same units: both choose after a fiftieth of the steps, and are one
run up to there. Training cost is multiply-adds over all steps, as a share of the dense training's; rows that start from
the dense model count its training too.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from cells import CACHE, Cell, Store, arguments, open_store, run, spread, spread_text
from channel_methods import small_resnet
from images import decode, read, training_arguments, whole
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from hf_prune import (
    AnnealingConfig,
    GrowingRegularizationConfig,
    PruneConfig,
    PruneTrainer,
    PruneWhileTrainingConfig,
    SnapshotEnsembleConfig,
)
from hf_prune.demo_data import load_fashion_mnist, minilm_path
from hf_prune.metrics import compute_metrics_for

SEEDS = (0, 1, 2)
START = 0.02
"""Share of the steps after which the removals at once, and the choice of GReg-1, take place."""
SIZES = {
    "fashion": {"rows": 55_000, "batch": 32, "dense_steps": 4000, "steps": 1800},
    "text": {"rows": 4080, "batch": 32, "dense_steps": 255, "steps": 128},
}
QUICK = {
    "fashion": {"rows": 2000, "batch": 32, "dense_steps": 120, "steps": 120},
    "text": {"rows": 256, "batch": 16, "dense_steps": 16, "steps": 64},
}
ROUNDS = 5
DENSE_LR = {"fashion": 3e-3, "text": 5e-5}
TUNE_LR = {"fashion": 1e-3, "text": 1e-4}


@dataclass(frozen=True)
class Row:
    """One way to a pruned model."""

    task: str
    config: PruneConfig
    from_random: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    """Training arguments that differ."""

    @property
    def in_rounds(self) -> bool:
        return isinstance(self.config, SnapshotEnsembleConfig)


def rows() -> dict[str, Row]:
    """Name -> row, the ones that are compared next to each other."""
    half, most = {"target_units": 0.5, "scope": "per_group"}, {"final_sparsity": 0.8, "scope": "per_group"}
    at_once = {"begin": START, "end": 0.5, "events": 1}  # a single event is at `begin`
    snapshots = {**half, "rounds": ROUNDS, "end": 0.1}
    small = {"cycle": "constant", "round_lr": 1e-4, "distill_lr": 1e-4, "alpha": 0.0}
    table = {
        "L1 at once": Row("fashion", PruneWhileTrainingConfig(**half, **at_once)),
        "GReg-1": Row("fashion", GrowingRegularizationConfig(**half, begin=START)),
        "GReg-2": Row("fashion", GrowingRegularizationConfig(**half, begin=START, variant=2)),
        "norm scales at once": Row("fashion", AnnealingConfig(**half, end=START, events=1, cuts=1)),
        "annealing": Row("fashion", AnnealingConfig(**half)),
    }
    for score in ("l1", "mean_activation", "random"):
        config = PruneWhileTrainingConfig(**half, score=score)
        table[f"while training, {score}"] = Row("fashion", config, from_random=True)
    table |= {
        "rounds, small rate": Row("fashion", SnapshotEnsembleConfig(**snapshots, **small)),
        "rounds, restarts": Row("fashion", SnapshotEnsembleConfig(**snapshots, round_lr=3e-3, alpha=0.0)),
        "rounds, snapshot teachers": Row("fashion", SnapshotEnsembleConfig(**snapshots, round_lr=3e-3)),
        "weights at once": Row("text", AnnealingConfig(**most, end=START, events=1)),
        "weights, GReg-1": Row("text", GrowingRegularizationConfig(**most, begin=START)),
        "weights, GReg-2": Row("text", GrowingRegularizationConfig(**most, begin=START, variant=2)),
    }
    return table


def train_cell(cell: Cell) -> dict[str, Any]:
    """Train or prune one model; returns accuracies in percent, and what its training cost."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    set_seed(cell["seed"])
    task, row = TASKS[cell["task"]](cell), rows().get(cell["row"])
    watch = Watch(task)
    trainer = make_trainer(cell, row, task, watch)
    watch.trainer = trainer
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    if row is None:
        trainer.save_model(str(dense_folder(cell)))
    accuracies = {split: 100.0 * task.accuracy(trainer, split) for split in ("validation", "test")}
    return {**accuracies, "seconds": round(seconds, 1), **watch.result(row)}


def make_trainer(cell: Cell, row: Row | None, task: Any, watch: Watch) -> Trainer:
    fresh = row is None or row.from_random
    steps = cell["steps"] // (ROUNDS + 1) if row is not None and row.in_rounds else cell["steps"]
    common = {
        "model": task.new_model() if fresh else task.open(str(dense_folder(cell))),
        "args": training_arguments(
            work_folder(cell),
            max_steps=steps,
            per_device_train_batch_size=cell["batch"],
            learning_rate=(DENSE_LR if fresh else TUNE_LR)[cell["task"]],
            seed=cell["seed"],
            **task.arguments,
        ),
        "train_dataset": task.data["train"],
        "data_collator": task.collator,
        "compute_metrics": compute_metrics_for("accuracy"),
        "callbacks": [watch],
    }
    if row is None:
        return Trainer(**common)
    return PruneTrainer(**common, pruning=dataclasses.replace(row.config, seed=cell["seed"]))


class Fashion:
    """A small ResNet on Fashion-MNIST."""

    arguments: ClassVar[dict[str, Any]] = {}
    collator = staticmethod(whole)
    has_widths = True

    def __init__(self, cell: Cell) -> None:
        self.data = read(pixels_path(cell))

    def new_model(self) -> PreTrainedModel:
        return small_resnet().to(memory_format=torch.channels_last)

    def open(self, folder: str) -> PreTrainedModel:
        return ResNetForImageClassification.from_pretrained(folder).to(memory_format=torch.channels_last)

    def accuracy(self, trainer: Trainer, split: str) -> float:
        return trainer.predict(self.data[split]).metrics["test_accuracy"]

    @torch.no_grad()
    def accuracy_now(self, model: PreTrainedModel) -> float:
        """Percent of the validation rows, without a look from the Trainer, which would count as an evaluation."""
        data, mode = self.data["validation"], model.training
        model.eval()
        batches = zip(data.images.split(250), data.labels.split(250), strict=True)
        hits = [model(pixel_values=x).logits.argmax(-1) == y for x, y in batches]
        model.train(mode)
        return 100.0 * torch.cat(hits).float().mean().item()


class Sentiment:
    """MiniLM on movie sentences."""

    has_widths = False
    arguments: ClassVar[dict[str, Any]] = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": True}

    def __init__(self, cell: Cell) -> None:
        from movement_text import predict, tokenized_rows

        self.predict = predict
        tokenizer, self.data = tokenized_rows(cell["rows"])
        self.collator = DataCollatorWithPadding(tokenizer)

    def new_model(self) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2)

    def open(self, folder: str) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(folder)

    def accuracy(self, trainer: Trainer, split: str) -> float:
        chosen = self.predict(trainer.model, self.data[split], self.collator).argmax(-1)
        return float((chosen == np.array(self.data[split]["label"])).mean())


TASKS: dict[str, Callable[[Cell], Any]] = {"fashion": Fashion, "text": Sentiment}


class Watch(TrainerCallback):
    """Processor time and multiply-adds of each step, and the validation accuracy right after the goal was reached."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.trainer: Any = None
        self.seconds: list[float] = []
        self.costs: list[float] = []
        self.cut: float | None = None
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pruner = getattr(self.trainer, "pruner", None)
        if pruner is not None and self.task.has_widths:
            graph = pruner.graph.traced
            self.costs.append(graph.price(pruner.plan).multiply_adds / graph.price().multiply_adds)
            if self.cut is None and pruner.at_goal:
                self.cut = self.task.accuracy_now(self.trainer.model)
        self.begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.process_time() - self.begun)

    def result(self, row: Row | None) -> dict[str, Any]:
        """step_time: of the last tenth of the steps, as a share of that of the first."""
        few = max(1, len(self.seconds) // 10)
        found: dict[str, Any] = {"step_time": float(np.median(self.seconds[-few:]) / np.median(self.seconds[:few]))}
        if self.costs and row is not None and not row.in_rounds:  # every round counts in units of its own
            found |= {"cost": sum(self.costs), "validation_after_the_cut": self.cut}
        return found


def pixels_path(cell: Cell) -> Path:
    return CACHE / "training_methods" / f"fashion-{cell['rows']}.pt"


def dense_folder(cell: Cell) -> Path:
    return CACHE / "training_methods" / f"{cell['task']}-{cell['rows']}-{cell['dense_steps']}-dense-{cell['seed']}"


def work_folder(cell: Cell) -> Path:
    return CACHE / "training_methods" / "runs" / f"{cell['task']}-{cell['row']}-{cell['seed']}".replace(" ", "-")


def dense_cell(task: str, seed: int, quick: bool) -> Cell:
    size = (QUICK if quick else SIZES)[task]
    return {"task": task, "row": "dense", "seed": seed, **size, "steps": size["dense_steps"]}


def row_cell(name: str, seed: int, quick: bool) -> Cell:
    """The cell's key holds the row's whole setting, so that another setting is another cell."""
    row = rows()[name]
    size = (QUICK if quick else SIZES)[row.task]
    steps = size["dense_steps"] if row.from_random else size["steps"]
    setting = {key: value for key, value in row.config.to_dict().items() if value not in (None, [])}
    return {"task": row.task, "row": name, "seed": seed, **size, "steps": steps, "setting": json.dumps(setting)}


def stages(quick: bool) -> Iterator[list[Cell]]:
    """Dense models first; the slowest rows first among the others, so that both processes end together."""
    seeds = (0,) if quick else SEEDS
    yield [dense_cell(task, seed, quick) for seed in seeds for task in TASKS]
    slow_first = sorted(rows(), key=lambda name: (not rows()[name].from_random, rows()[name].task == "fashion"))
    yield [row_cell(name, seed, quick) for seed in seeds for name in slow_first]


def summarise(store: Store, quick: bool) -> dict[str, Any]:
    """The table's numbers, from finished cells alone; what is not there yet is left out."""
    seeds = (0,) if quick else SEEDS
    dense = {task: [dense_cell(task, seed, quick) for seed in seeds] for task in TASKS}
    table: dict[str, Any] = {
        f"dense, {task}": {"test": spread([store[cell]["test"] for cell in cells if cell in store])}
        for task, cells in dense.items()
    }
    for name, row in rows().items():
        done = [store[cell] for cell in (row_cell(name, seed, quick) for seed in seeds) if cell in store]
        table[name] = {
            key: spread([each[key] for each in done if each.get(key) is not None])
            for key in ("test", "validation_after_the_cut", "step_time")
        }
        size = (QUICK if quick else SIZES)[row.task]
        before = 0 if row.from_random else size["dense_steps"]
        costs = [(before + each["cost"]) / size["dense_steps"] for each in done if "cost" in each]
        table[name]["cost"] = spread(costs)
    return {"rows": table, "sizes": QUICK if quick else SIZES, "claims": dict(claims(table))}


def claims(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the papers say, in numbers; only where both sides are there."""

    def difference(key: str, ours: str, theirs: str) -> float | None:
        pair = [table.get(name, {}).get(key) for name in (ours, theirs)]
        return None if None in pair else round(pair[0]["mean"] - pair[1]["mean"], 3)

    for key in ("validation_after_the_cut", "test"):
        yield f"GReg-1 - L1 at once, points, {key}", difference(key, "GReg-1", "L1 at once")
    yield "GReg-2 - GReg-1, points", difference("test", "GReg-2", "GReg-1")
    yield "GReg-1 - at once, weights of a text model, points", difference("test", "weights, GReg-1", "weights at once")
    yield "annealing - norm scales at once, points", difference("test", "annealing", "norm scales at once")
    last = table["annealing"]["step_time"]
    yield "annealing: step time at the end / at the start (at most 0.7)", last and round(last["mean"], 3)
    for score in ("l1", "mean_activation", "random"):
        name = f"while training, {score}"
        yield f"{name} - train and retrain, points", difference("test", name, "L1 at once")
    ours, theirs = (table[name]["cost"] for name in ("while training, l1", "L1 at once"))
    saved = round(1 - ours["mean"] / theirs["mean"], 3) if ours and theirs else None
    yield "while training: multiply-adds of training saved against train and retrain (paper: 0.41)", saved
    yield "restarts - small rate, points", difference("test", "rounds, restarts", "rounds, small rate")
    yield "snapshot teachers - restarts, points", difference("test", "rounds, snapshot teachers", "rounds, restarts")


def print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {"test": 2, "validation_after_the_cut": 2, "cost": 2, "step_time": 2}
    heads = ("test, %", "after the cut, %", "training cost", "last / first step")
    shown = Table("row", *heads)
    for name, row in summary["rows"].items():
        shown.add_row(name, *(spread_text(row.get(key), digits) for key, digits in columns.items()))
    console = Console(width=120)
    console.print(shown)
    for claim, value in summary["claims"].items():
        console.print(f"{claim}: {'-' if value is None else value}")


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    store = open_store("training_methods", options.quick)
    if not options.table:
        size = (QUICK if options.quick else SIZES)["fashion"]
        decode(load_fashion_mnist, size["rows"], pixels_path(size))
        for cells in stages(options.quick):
            for cell in cells:
                if cell["row"] == "dense" and not dense_folder(cell).exists():
                    store.forget(cell)  # the others start from its model
            run(cells, train_cell, store, options.workers)
    summary = summarise(store, options.quick)
    store.write(summary=summary)
    print_table(summary)


if __name__ == "__main__":
    main()
