"""Soft and hard movement pruning against magnitude on movie sentiment: same teacher, steps and number of trials.

    python benchmarks/movement_text.py            # all cells; finished ones are kept, so it can be stopped and resumed
    python benchmarks/movement_text.py --quick    # a few hundred rows, one seed, minutes
    python benchmarks/movement_text.py --table    # only print what is there

Student: all-MiniLM-L6-v2 with a new head, encoder linears pruned (10.6M of 22.7M weights), embeddings frozen. Teacher:
the dense model of seed 0, fine-tuned on the same rows; its answers to the training rows are computed once. Each method
gets the same number of settings, chosen on the validation rows at 90 % with seed 0; test rows are scored once, with the
chosen setting, over three seeds. At 80 % only movement runs, against dense. A method whose best setting is at chance at
90 % is run over the seeds there and not at other sparsities; `movement_signal.py` looks for the reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import CACHE, Cell, Store, accuracy, arguments, hits, open_store, run, spread, spread_text
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_prune import DistillConfig, MovementConfig, PruneTrainer
from hf_prune.demo_data import load_movie_sentiment, minilm_path

METHODS = ("magnitude", "hard", "soft")
SEEDS = (0, 1, 2)
SPARSITIES = (0.9, 0.97, 0.8)
FULL = {"rows": 8160, "epochs": 2, "batch": 32}
QUICK = {"rows": 512, "epochs": 1, "batch": 32}
# Learning rates of weights and scores, lambda, begin and end of the schedule: the trials of each method. Hard movement
# has the paper's Adam on its scores, and the plain sum, whose ranking `movement_signal.py` finds to carry more signal.
_EARLY, _LATE = {"begin": 0.05, "end": 0.7}, {"begin": 0.35, "end": 0.8}
TRIALS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{"lr": 1e-4, **_EARLY}, {"lr": 2e-4, **_EARLY}],
    "hard": [
        {"lr": 2e-4, "score_lr": 1e-2, **_EARLY},
        {"lr": 2e-4, "score_lr": 1.0, "score_optimizer": "sgd", **_LATE},
    ],
    "soft": [{"lr": 2e-4, "score_lr": 3e-2, "penalty_weight": weight, **_EARLY} for weight in (300.0, 3000.0)],
}
DENSE = {"lr": 5e-5}
CHANCE = 60.0
"""Validation accuracy, in percent, below which a method has learned nothing; the larger class has 51."""
PRUNING_FIELDS = ("score_lr", "score_optimizer", "penalty_weight", "begin", "end")


def train_cell(cell: Cell) -> dict[str, Any]:
    """Train one model; returns per-row correctness on validation and test, the seconds, and the sparsity reached."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tokenizer, data = tokenized_rows(cell["rows"])
    set_seed(cell["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2)
    common = {
        "model": model,
        "args": training_arguments(cell),
        "train_dataset": data["train"],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
    }
    if cell["method"] == "dense":
        trainer = Trainer(**common)
    else:
        own = {name: value for name, value in cell.items() if name in PRUNING_FIELDS}
        pruning = MovementConfig(variant=cell["method"], final_sparsity=cell["sparsity"], **own)
        trainer = PruneTrainer(
            **common,
            pruning=pruning,
            teacher=Remembering(cell),
            distillation=DistillConfig(temperature=2.0, alpha=0.9),
        )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    if cell["method"] == "dense":
        trainer.save_model(dense_folder(cell))
        if cell["seed"] == 0:
            answers = predict(trainer.model, data["train"], common["data_collator"]).tolist()
            table = {tuple(ids): row for ids, row in zip(data["train"]["input_ids"], answers, strict=True)}
            torch.save(table, teacher_answers(cell))
    reached = trainer.report.sparsity if cell["method"] != "dense" else 0.0
    correct = correctness(trainer.model, data, common["data_collator"])
    return {"correct": correct, "seconds": round(seconds, 1), "sparsity": reached}


def training_arguments(cell: Cell) -> TrainingArguments:
    """How the cell's model trains."""
    return TrainingArguments(
        str(_folder(cell) / "run"),
        per_device_train_batch_size=cell["batch"],
        per_device_eval_batch_size=64,
        num_train_epochs=cell["epochs"],
        learning_rate=cell["lr"],
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        seed=cell["seed"],
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )


def correctness(model: torch.nn.Module, data: DatasetDict, collator: DataCollatorWithPadding) -> dict[str, str]:
    """0 or 1 for each row of validation and test, in one line each."""
    hits = {split: predict(model, data[split], collator).argmax(-1) for split in ("validation", "test")}
    return {
        split: "".join(str(int(each)) for each in hit == np.array(data[split]["label"])) for split, hit in hits.items()
    }


def tokenized_rows(limit: int) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
    """The tokenizer and the movie sentences, at most `limit` of them to train on, as token ids and labels."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    data = load_movie_sentiment(limit=limit).map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True
    )
    return tokenizer, data.remove_columns(["text", "score"])


def predict(model: torch.nn.Module, rows: Dataset, collator: DataCollatorWithPadding) -> np.ndarray:
    """Logits in the order of `rows`; a Trainer that groups rows by length while it trains would also reorder these."""
    arguments = TrainingArguments(
        str(CACHE / "predict"), per_device_eval_batch_size=64, use_cpu=True, disable_tqdm=True
    )
    answer = Trainer(model=model, args=arguments, data_collator=collator).predict(rows)
    assert answer.label_ids.tolist() == rows["label"], "predictions came back in another order"
    return answer.predictions


class Remembering(torch.nn.Module):
    """A teacher that looks its answers up by the row's tokens instead of computing them again in every cell."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.config = AutoConfig.from_pretrained(dense_folder(cell))
        self.answers = torch.load(teacher_answers(cell), weights_only=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return {"logits": torch.tensor([self.answers[row] for row in rows])}


def _folder(cell: Cell) -> Path:
    return CACHE / "movement_text" / f"{cell['rows']}-{cell['epochs']}"


def teacher_answers(cell: Cell) -> Path:
    return Path(dense_folder(cell)) / "answers.pt"


def dense_folder(cell: Cell) -> str:
    """Where the dense model that the cell begins or learns from is kept."""
    seed = cell["seed"] if cell["method"] == "dense" else 0
    return str(_folder(cell) / f"dense-{seed}")


def dense_cell(seed: int, size: dict[str, int]) -> Cell:
    return {"method": "dense", "seed": seed, "sparsity": 0.0, **size, **DENSE}


def pruned_cell(method: str, sparsity: float, seed: int, setting: dict[str, Any], size: dict[str, int]) -> Cell:
    return {"method": method, "sparsity": sparsity, "seed": seed, **size, **setting}


def chosen_setting(store: Store, method: str, size: dict[str, int]) -> dict[str, Any]:
    """The trial with the highest validation accuracy at 90 %, seed 0; of equal ones the first."""
    return max(
        TRIALS[method], key=lambda trial: accuracy(store, pruned_cell(method, 0.9, 0, trial, size), "validation")
    )


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean difference in points and its 95 % interval, resampling seeds and rows together.

    ours, theirs: (seeds, rows) of 0 and 1, the same rows in the same order.
    """
    generator = np.random.default_rng(0)
    difference = 100.0 * (ours - theirs)
    seeds, rows = difference.shape
    means = np.empty(draws)
    for i in range(draws):
        picked_rows = difference[:, generator.integers(0, rows, rows)]
        means[i] = picked_rows[generator.integers(0, seeds, seeds)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def summarise(store: Store, seeds: tuple[int, ...], size: dict[str, int]) -> dict[str, Any]:
    """The tables' numbers, from finished cells alone; what is not there yet is left out."""
    table: dict[str, Any] = {"dense": _test_accuracy(store, [dense_cell(seed, size) for seed in seeds])}
    settings = {
        method: chosen_setting(store, method, size)
        for method in METHODS
        if all(pruned_cell(method, 0.9, 0, trial, size) in store for trial in TRIALS[method])
    }
    for sparsity in SPARSITIES:
        by_method = {
            method: [pruned_cell(method, sparsity, seed, setting, size) for seed in seeds]
            for method, setting in settings.items()
        }
        row: dict[str, Any] = {method: _test_accuracy(store, cells) for method, cells in by_method.items()}
        done = {method for method, cells in by_method.items() if all(cell in store for cell in cells)}
        for method in ("hard", "soft"):
            if {method, "magnitude"} <= done:
                ours, theirs = (np.stack([hits(store, c, "test") for c in by_method[m]]) for m in (method, "magnitude"))
                row[f"{method} - magnitude"] = dict(
                    zip(("points", "low", "high"), paired_bootstrap(ours, theirs), strict=True)
                )
        table[f"{sparsity:.0%}"] = row
    return {"settings": settings, "test_accuracy": table, "size": size}


def _test_accuracy(store: Store, cells: list[Cell]) -> dict[str, float] | None:
    return spread([accuracy(store, cell, "test") for cell in cells if cell in store])


def print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        "sparsity", "dense", *METHODS, "hard - magnitude", "soft - magnitude", title="Test accuracy, % (mean ± std)"
    )
    dense = summary["test_accuracy"]["dense"]
    for name, row in summary["test_accuracy"].items():
        if name == "dense":
            continue
        methods = [spread_text(row.get(method)) for method in METHODS]
        gains = [_gain_text(row.get(f"{method} - magnitude")) for method in ("hard", "soft")]
        shown.add_row(name, spread_text(dense), *methods, *gains)
    Console(width=140).print(shown, summary["settings"])


def _gain_text(value: dict[str, float] | None) -> str:
    return f"{value['points']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]" if value else "-"


def stages(store: Store, seeds: tuple[int, ...], size: dict[str, int]) -> Iterator[list[Cell]]:
    """Cells in the order of what they tell; a stage may look at the results of those before it."""
    dense = [dense_cell(seed, size) for seed in seeds]
    if not teacher_answers(dense[0]).exists():
        store.forget(dense[0])
    yield dense[:2]  # the first is everyone's teacher
    for methods in (("magnitude", "soft"), ("hard",)):
        yield [pruned_cell(method, 0.9, 0, trial, size) for method in methods for trial in TRIALS[method]]
        chosen = {method: chosen_setting(store, method, size) for method in methods}
        failed = {
            method
            for method, setting in chosen.items()
            if accuracy(store, pruned_cell(method, 0.9, 0, setting, size), "validation") < CHANCE
        }
        for sparsity in SPARSITIES:
            against_dense_only = sparsity == 0.8
            left_out = (failed if sparsity != 0.9 else set()) | ({"magnitude"} if against_dense_only else set())
            compared = [method for method in methods if method not in left_out]
            yield [pruned_cell(m, sparsity, seed, chosen[m], size) for seed in seeds for m in compared]
    yield dense


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    size, seeds = (QUICK, (0,)) if options.quick else (FULL, SEEDS)
    store = open_store("movement_text", options.quick)
    if not options.table:
        for cells in stages(store, seeds, size):
            run(cells, train_cell, store, options.workers)
    summary = summarise(store, seeds, size)
    store.write(summary=summary)
    print_table(summary)


if __name__ == "__main__":
    main()
