"""Methods that only score, against the plain scores: movie sentiment for weights, Fashion-MNIST for channels.

    python benchmarks/scores.py            # all cells; finished ones are kept, so it can be stopped and resumed
    python benchmarks/scores.py --quick    # a few hundred rows, one seed, minutes
    python benchmarks/scores.py --table    # only print what is there

Texts: the dense model of each seed, trained as that of movement_text.py on a quarter of the rows, loses 90 or 95 % of
its encoder's weights between 5 and 50 % of one more epoch. "rescale" prunes the dense model of seed 0 at once, as it is
and with the values of its first block times 100 and the output projection over 100, which changes no output. Images:
the dense model of each seed loses channels inside blocks at once, down to half of the multiply-adds, and is tuned;
relevance and L1 "while training" prune within one training from nothing. "cost" times EZCrop's score and a rank by
singular values on the same maps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import CACHE, Cell, Store, accuracy, arguments, hits, open_store, run, spread, spread_text
from channel_methods import small_resnet
from images import Pixels, decode, read, training_arguments, whole
from movement_text import QUICK as TEXT_QUICK
from movement_text import correctness, dense_cell, dense_folder, paired_bootstrap, tokenized_rows
from movement_text import train_cell as train_text
from movement_text import training_arguments as text_arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    ResNetForImageClassification,
    Trainer,
    set_seed,
)
from transformers.utils import logging

from hf_prune import (
    ChannelSimilarityConfig,
    EZCropConfig,
    FeatureRelevanceConfig,
    LookaheadConfig,
    MagnitudeConfig,
    PruneConfig,
    Pruner,
    PruneTrainer,
    WeightImportanceConfig,
)
from hf_prune.demo_data import load_fashion_mnist
from hf_prune.graph import trace
from hf_prune.graph.trace import evaluating
from hf_prune.methods.ezcrop import energy_outside
from hf_prune.parts.statistics import Calibration, Point, gather

SEEDS = (0, 1, 2)
SPARSITIES = (0.9, 0.95)
DURING = {"begin": 0.05, "end": 0.5}
WEIGHTS: dict[str, Callable[[float], PruneConfig]] = {
    "magnitude": lambda sparsity: MagnitudeConfig(final_sparsity=sparsity, **DURING),
    "lookahead": lambda sparsity: LookaheadConfig(final_sparsity=sparsity, rounds=8, scope="global", **DURING),
    "lookahead per layer": lambda sparsity: LookaheadConfig(final_sparsity=sparsity, rounds=8, **DURING),
    "weight importance": lambda sparsity: WeightImportanceConfig(
        final_sparsity=sparsity, rounds=4, calibration_batches=16, **DURING
    ),
}
INNER = ("*.layer.0.convolution",)
GOAL: dict[str, Any] = {"target_flops": 0.5, "scope": "per_group", "include": INNER}
AT_ONCE: dict[str, Callable[[], PruneConfig]] = {
    "L1": lambda: MagnitudeConfig(**GOAL),
    "EZCrop": lambda: EZCropConfig(**GOAL),
    "SVD rank": lambda: EZCropConfig(**GOAL),
    "similarity": lambda: ChannelSimilarityConfig(**GOAL),
    "similarity, measured": lambda: ChannelSimilarityConfig(**GOAL, correlation="empirical"),
}
WHILE_TRAINING: dict[str, Callable[[], PruneConfig]] = {
    "L1 while training": lambda: MagnitudeConfig(**GOAL, begin=0.1, end=0.7),
    "relevance": lambda: FeatureRelevanceConfig(
        target_flops=0.5, include=INNER, begin=0.1, end=0.7, rounds=6, calibration_batches=16
    ),
}
TEXT_FULL = {"rows": 2040, "epochs": 2, "batch": 32}
IMAGES_FULL = {"rows": 30_000, "dense_steps": 3000, "steps": 900, "batch": 32}
IMAGES_QUICK = {"rows": 1000, "dense_steps": 60, "steps": 20, "batch": 32}


def run_cell(cell: Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    return CELLS[cell["kind"]](cell)


def text_dense(cell: Cell) -> dict[str, Any]:
    """Train the dense model of movement_text.py, unless it is there."""
    own = dense_cell(cell["seed"], _text_size(cell))
    if not dense_model(cell).exists():
        return train_text(own)
    tokenizer, data = tokenized_rows(cell["rows"])
    return {"correct": correctness(_reopen(own), data, DataCollatorWithPadding(tokenizer))}


def dense_model(cell: Cell) -> Path:
    """Where a dense cell's model is kept."""
    if cell["kind"] == "image dense":
        return _dense_image(cell)
    return Path(dense_folder(dense_cell(cell["seed"], _text_size(cell)))) / "config.json"


def text_pruned(cell: Cell) -> dict[str, Any]:
    """Prune the seed's dense model while it trains for one more epoch."""
    tokenizer, data = tokenized_rows(cell["rows"])
    collator, dense = DataCollatorWithPadding(tokenizer), dense_cell(cell["seed"], _text_size(cell))
    set_seed(cell["seed"])
    trainer = PruneTrainer(
        model=_reopen(dense),
        args=text_arguments({**dense, "method": cell["method"], "epochs": 1, "lr": cell["lr"]}),
        train_dataset=data["train"],
        data_collator=collator,
        processing_class=tokenizer,
        pruning=WEIGHTS[cell["method"]](cell["sparsity"]),
    )
    begin = time.process_time()
    trainer.train()
    seconds = round(time.process_time() - begin, 1)
    assert trainer.report is not None
    return {
        "correct": correctness(trainer.model, data, collator), "seconds": seconds, "sparsity": trainer.report.sparsity
    }  # fmt: skip


def text_rescaled(cell: Cell) -> dict[str, Any]:
    """Accuracy of a model pruned at once, as it was and rescaled, and how much of the plan differs."""
    tokenizer, data = tokenized_rows(cell["rows"])
    collator, own = DataCollatorWithPadding(tokenizer), dense_cell(0, _text_size(cell))
    rows = data["train"].select(range(min(512, len(data["train"])))).rename_column("label", "labels")
    loader = DataLoader(rows, batch_size=32, collate_fn=collator)
    plans, found = [], {}
    for name, factor in (("as it was", 1.0), ("rescaled", 100.0)):
        model = _reopen(own).eval()
        rescale(model, factor)
        pruner = Pruner(model, at_once(cell["method"], cell["sparsity"]), data=loader)
        pruner.attach()
        pruner.step(1, 1)
        plans.append({weight: keep.clone() for weight, keep in pruner.plan.items()})
        pruner.finalize()
        found[name] = correctness(model, data, collator)
    differing = sum(int((keep != plans[1][name]).sum()) for name, keep in plans[0].items())
    return {"correct": found["as it was"], "correct_rescaled": found["rescaled"], "differing": differing}


def at_once(method: str, sparsity: float) -> PruneConfig:
    """The same method without a schedule."""
    config = WEIGHTS[method](sparsity)
    fields = {name: value for name, value in config.to_dict().items() if name not in ("begin", "end", "rounds")}
    return type(config).from_dict(fields)


@torch.no_grad()
def rescale(model: nn.Module, factor: float) -> None:
    """Multiply the values of the first block, and divide what reads them."""
    attention: Any = next(module for module in model.modules() if hasattr(module, "self") and hasattr(module, "output"))
    attention.self.value.weight *= factor
    attention.self.value.bias *= factor
    attention.output.dense.weight /= factor


def _reopen(own: Cell) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(dense_folder(own))


def _text_size(cell: Cell) -> dict[str, int]:
    return {name: cell[name] for name in ("rows", "epochs", "batch")}


def image_dense(cell: Cell) -> dict[str, Any]:
    """Train the dense model of a seed."""
    data = read(pixels_path(cell))
    set_seed(cell["seed"])
    model = small_resnet().to(memory_format=torch.channels_last)
    trainer = Trainer(model, **_training(cell, data, cell["dense_steps"], 3e-3))
    trainer.train()
    trainer.save_model(str(_dense_image(cell)))
    return {"correct": _correct(trainer.model, data)}


def image_at_once(cell: Cell) -> dict[str, Any]:
    """Prune the seed's dense model at once, then tune it; correctness before and after."""
    data = read(pixels_path(cell))
    set_seed(cell["seed"])
    model = ResNetForImageClassification.from_pretrained(_dense_image(cell)).eval()
    model.to(memory_format=torch.channels_last)
    images, labels = data["train"].images, data["train"].labels
    parts = zip(images[:640].split(128), labels[:640].split(128), strict=True)
    batches = [{"pixel_values": x, "labels": y} for x, y in parts]
    pruner = Pruner(model, AT_ONCE[cell["method"]](), {"pixel_values": images[:2]}, data=batches)
    price = pruner.graph.traced.price().multiply_adds
    pruner.attach()
    if cell["method"] == "SVD rank":
        pruner.recipe.measured_scores = lambda calibration: ranks(pruner, calibration)
    begin = time.process_time()
    pruner.step(1, 1)
    seconds = round(time.process_time() - begin, 2)
    pruner.finalize()
    before = _correct(model, data)
    if cell["steps"]:
        Trainer(model, **_training(cell, data, cell["steps"], 1e-3)).train()
    kept = trace(model.eval(), {"pixel_values": images[:2]}).price().multiply_adds / price
    return {"correct": _correct(model, data), "before": before, "multiply_adds": kept, "scoring_seconds": seconds}


def ranks(pruner: Pruner, calibration: Calibration) -> Mapping[str, Tensor]:
    """Mean rank of each channel's map, from its singular values (what HRank ranks by)."""
    points = {each.name: Point(f"{each.name}", _rank_sum) for each in pruner.recipe.structures}
    return gather(pruner.model, calibration.batches(5), points)


def _rank_sum(maps: Tensor) -> tuple[Tensor, int]:
    return torch.linalg.matrix_rank(maps).double().sum(0), len(maps)


def image_while_training(cell: Cell) -> dict[str, Any]:
    """Prune within one training from nothing."""
    data = read(pixels_path(cell))
    set_seed(cell["seed"])
    model = small_resnet().to(memory_format=torch.channels_last)
    example = {"pixel_values": data["validation"].images[:2]}
    price = trace(model, example).price().multiply_adds
    config = WHILE_TRAINING[cell["method"]]()
    trainer = PruneTrainer(model, pruning=config, **_training(cell, data, cell["dense_steps"], 3e-3))
    begin = time.process_time()
    trainer.train()
    seconds = round(time.process_time() - begin, 1)
    kept = trace(trainer.model.eval(), example).price().multiply_adds / price
    return {"correct": _correct(trainer.model, data), "multiply_adds": kept, "seconds": seconds}


@torch.no_grad()
def cost(cell: Cell) -> dict[str, Any]:
    """Seconds of both scores on the maps of every convolution inside the blocks, medians of five in turn."""
    data, maps = read(pixels_path(cell)), []
    model = ResNetForImageClassification.from_pretrained(_dense_image(cell)).eval()
    layers = [module for name, module in model.named_modules() if name.endswith("layer.0.convolution")]
    handles = [layer.register_forward_hook(lambda module, taken, output: maps.append(output)) for layer in layers]
    with evaluating(model):
        model(pixel_values=data["train"].images[:128])
    for handle in handles:
        handle.remove()
    scores = {"ezcrop": lambda x: energy_outside(x, 0.25), "svd_rank": torch.linalg.matrix_rank}
    seconds: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(5):
        for name, score in scores.items():
            begin = time.perf_counter()
            for each in maps:
                score(each)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {**medians, "share": medians["ezcrop"] / medians["svd_rank"]}


def pixels_path(size: Mapping[str, Any]) -> Path:
    return CACHE / "scores" / f"pixels-{size['rows']}.pt"


def _dense_image(cell: Cell) -> Path:
    return CACHE / "scores" / f"dense-{cell['rows']}-{cell['dense_steps']}-{cell['seed']}"


def _training(cell: Cell, data: dict[str, Pixels], steps: int, lr: float) -> dict[str, Any]:
    run = {"max_steps": steps, "per_device_train_batch_size": cell["batch"], "learning_rate": lr, "seed": cell["seed"]}
    options = training_arguments(CACHE / "scores" / "run", **run)
    return {"args": options, "train_dataset": data["train"], "data_collator": whole}


@torch.no_grad()
def _correct(model: nn.Module, data: dict[str, Pixels]) -> dict[str, str]:
    model.eval()
    lines = {}
    for split in ("validation", "test"):
        parts = zip(data[split].images.split(250), data[split].labels.split(250), strict=True)
        hit = torch.cat([model(pixel_values=images).logits.argmax(-1) == labels for images, labels in parts])
        lines[split] = "".join(str(int(each)) for each in hit)
    return lines


CELLS: dict[str, Callable[[Cell], dict[str, Any]]] = {
    "text dense": text_dense,
    "text": text_pruned,
    "rescale": text_rescaled,
    "image dense": image_dense,
    "at once": image_at_once,
    "while training": image_while_training,
    "cost": cost,
}


class Plan:
    """All cells of a full or quick run."""

    def __init__(self, quick: bool) -> None:
        self.text, self.images = (TEXT_QUICK, IMAGES_QUICK) if quick else (TEXT_FULL, IMAGES_FULL)
        self.seeds = (0,) if quick else SEEDS
        self.sparsities = (0.9,) if quick else SPARSITIES

    def dense(self) -> list[Cell]:
        return [
            cell
            for seed in self.seeds
            for cell in (
                {"kind": "text dense", "seed": seed, **self.text},
                {"kind": "image dense", "seed": seed, **self.images},
            )
        ]

    def weights(self, method: str, sparsity: float) -> list[Cell]:
        own = {"kind": "text", "method": method, "sparsity": sparsity, "lr": 1e-4, **self.text}
        return [{**own, "seed": seed} for seed in self.seeds]

    def rescaled(self, method: str) -> Cell:
        return {"kind": "rescale", "method": method, "sparsity": 0.5, "seed": 0, **self.text}

    def channels(self, method: str) -> list[Cell]:
        kind = "at once" if method in AT_ONCE else "while training"
        return [{"kind": kind, "method": method, "seed": seed, **self.images} for seed in self.seeds]

    def cost(self) -> Cell:
        return {"kind": "cost", "seed": 0, **self.images}

    def rest(self) -> list[Cell]:
        weights = [cell for m in WEIGHTS for sparsity in self.sparsities for cell in self.weights(m, sparsity)]
        channels = [cell for method in (*AT_ONCE, *WHILE_TRAINING) for cell in self.channels(method)]
        return [*weights, *channels, *map(self.rescaled, WEIGHTS)]


def summarise(store: Store, plan: Plan) -> dict[str, Any]:
    """The tables' numbers, from finished cells alone; what is not there yet is left out."""
    weights = {f"{s:.0%}": {m: weights_row(store, plan, m, s) for m in WEIGHTS} for s in plan.sparsities}
    channels = {method: channels_row(store, plan.channels(method)) for method in (*AT_ONCE, *WHILE_TRAINING)}
    rescaled = {method: store[plan.rescaled(method)] for method in WEIGHTS if plan.rescaled(method) in store}
    return {
        "weights": weights,
        "channels": channels,
        "dense": {
            kind: spread([accuracy(store, c, "test") for c in plan.dense() if c["kind"] == kind and c in store])
            for kind in ("text dense", "image dense")
        },
        "rescaled": {
            method: {
                "as it was": _percent(found["correct"]["test"]),
                "rescaled": _percent(found["correct_rescaled"]["test"]),
                "differing weights": found["differing"],
            }
            for method, found in rescaled.items()
        },
        "cost": [store[cell] for cell in [plan.cost()] if cell in store],
    }


def weights_row(store: Store, plan: Plan, method: str, sparsity: float) -> dict[str, Any]:
    cells, baseline = plan.weights(method, sparsity), plan.weights("magnitude", sparsity)
    row: dict[str, Any] = {"test": spread([accuracy(store, cell, "test") for cell in cells if cell in store])}
    if method != "magnitude" and all(cell in store for cell in (*cells, *baseline)):
        ours, theirs = (np.stack([hits(store, cell, "test") for cell in each]) for each in (cells, baseline))
        row["gain"] = dict(zip(("points", "low", "high"), paired_bootstrap(ours, theirs), strict=True))
    return row


def channels_row(store: Store, cells: list[Cell]) -> dict[str, Any]:
    done = [store[cell] for cell in cells if cell in store]
    return {
        "multiply_adds": spread([each["multiply_adds"] for each in done]),
        "before": spread([_percent(each["before"]["test"]) for each in done if "before" in each]),
        "test": spread([_percent(each["correct"]["test"]) for each in done]),
    }


def _percent(line: str) -> float:
    return 100.0 * line.count("1") / len(line)


def print_tables(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    text = Table("sparsity", "method", "test accuracy, %", "points over magnitude (95 %)", title="Movie sentiment")
    for sparsity, methods in summary["weights"].items():
        for method, row in methods.items():
            gain = "{points:+.1f} [{low:+.1f}, {high:+.1f}]".format(**row["gain"]) if "gain" in row else "-"
            text.add_row(sparsity, method, spread_text(row["test"]), gain)
    images = Table("method", "multiply-adds kept", "before tuning, %", "test accuracy, %", title="Fashion-MNIST")
    for method, row in summary["channels"].items():
        images.add_row(
            method, spread_text(row["multiply_adds"], 3), spread_text(row["before"]), spread_text(row["test"], 2)
        )
    console.print(text, images, "dense:", summary["dense"], "rescaled:", summary["rescaled"], "cost:", summary["cost"])


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    plan, store = Plan(options.quick), open_store("scores", options.quick)
    if not options.table:
        decode(load_fashion_mnist, plan.images["rows"], pixels_path(plan.images))
        for cell in plan.dense():
            if not dense_model(cell).exists():
                store.forget(cell)  # the others start from its model
        run(plan.dense(), run_cell, store, options.workers)
        run([plan.cost()], run_cell, store, 1)  # a timing, so by itself
        run(plan.rest(), run_cell, store, options.workers)
    summary = summarise(store, plan)
    store.write(summary=summary)
    print_tables(summary)


if __name__ == "__main__":
    main()
