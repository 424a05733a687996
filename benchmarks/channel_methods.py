"""Every method that prunes channels, on Fashion-MNIST and on emoji drawings, from one dense model and with equal steps.

    python benchmarks/channel_methods.py            # all cells; finished ones stay, so it can be stopped and resumed
    python benchmarks/channel_methods.py --only resrep "uniform L1" --task fashion      # some rows of one task
    python benchmarks/channel_methods.py --quick    # few rows and steps, one seed, minutes: shows that it runs
    python benchmarks/channel_methods.py --table    # only print what is there

A row is a method under its setting in `TRIALS`, or its config's defaults, on the channels inside blocks: residual
streams stay whole, but in a second setting of uniform L1. Rows with several settings are tried on Fashion-MNIST at half
of the multiply-adds with seed 0, and the one with the best validation accuracy is used everywhere; test rows count for
that one alone. All rows train for the same number of optimizer steps, search included, with AdamW under a cosine; the
fields "training" of a setting change that. `longer` compares a few rows under more steps. Overhead is processor time of
training over that of "tuned", which only trains on.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from cells import CACHE, RESULTS, Cell, Store, arguments, open_store, run, spread, spread_text
from images import Pixels, decode, read, training_arguments, whole
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    set_seed,
)
from transformers.utils import logging

from hf_prune import PruneConfig, PruneError, PruneTrainer, methods
from hf_prune.demo_data import MissingPackage, load_emoji, load_fashion_mnist, load_mobilenet_v2
from hf_prune.graph import trace
from hf_prune.metrics import compute_metrics_for

SEEDS = (0, 1, 2)
TOLERANCE, GUARDED_RUNS, GUARDED_KEPT = 1.0, 10, 9
"""Points that Play and Prune may lose, runs in which that is looked at, and in how many it must hold."""
BELOW_UNIFORM, RESREP_LOSS = 0.3, 0.5
"""Points that a method may be below uniform L1, and ResRep below the dense model, at half of the multiply-adds."""
ABOVE_UNIFORM = ("dmcp", "prunenet", "resrep")
"""Methods that find widths, which should be no worse than equal ones."""
FROM_SCRATCH, SCRATCH_GOAL, SCRATCH_LOSS = "bwcp from scratch", 0.57, 0.5
"""BWCP within the dense model's own training: the row, multiply-adds kept, and points that it may lose."""
LONGER, TIMES, LONGER_ROWS = "longer", 3, ("uniform L1", "resrep")
"""Rows that train for some times as many steps, too: forgetting takes its time."""
SPECIAL = {"play_and_prune": "play_and_prune", FROM_SCRATCH: "bwcp"}
"""Rows with a goal or a start of their own, which are in no table -> method."""


@dataclass(frozen=True)
class Task:
    load: Callable[..., Any]
    build: Callable[[], PreTrainedModel]
    inner: tuple[str, ...]
    """Layers inside blocks, whose width no residual stream shares."""
    units: int
    """About how many channels there are."""
    layers: int
    """Layers that `inner` names."""
    goals: dict[float, tuple[int, ...]]
    """Fraction of the multiply-adds kept -> seeds."""
    dense: dict[str, Any]
    """What differs where the dense model trains: "training" arguments, and the "shift" of images."""
    full: dict[str, Any]
    quick: dict[str, Any]


def small_resnet() -> PreTrainedModel:
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2]}
    shape = {"layer_type": "basic", "downsample_in_first_stage": False, "num_channels": 1, "num_labels": 10}
    return ResNetForImageClassification(ResNetConfig(**sizes, **shape))


TASKS = {
    "fashion": Task(
        load_fashion_mnist, small_resnet, ("*.layer.0.convolution",), 448, 6, {0.5: SEEDS, 0.3: (0,)},
        {"training": {"learning_rate": 3e-3, "weight_decay": 0.05}, "shift": 1},
        {"rows": 55_000, "dense_steps": 12_000, "steps": 2400, "batch": 32},
        {"rows": 2000, "dense_steps": 100, "steps": 60, "batch": 32},
    ),
    "emoji": Task(
        load_emoji, lambda: load_mobilenet_v2(9), ("*.expand_1x1.convolution",), 7000, 16, {0.5: SEEDS},
        {"training": {"learning_rate": 1e-3}},
        {"rows": 3030, "dense_steps": 480, "steps": 240, "batch": 32},
        {"rows": 200, "dense_steps": 20, "steps": 30, "batch": 8},
    ),
}  # fmt: skip


class Scale(NamedTuple):
    """What settings depend on."""

    steps: int
    units: int
    layers: int
    goal: float


def scale_of(task: str, goal: float, steps: int) -> Scale:
    return Scale(steps, TASKS[task].units, TASKS[task].layers, goal)


EARLY = {"begin": 0.0, "end": 0.3}
"""What rankings alone need: cut early, then tune."""


def early(**more: Any) -> dict[str, Any]:
    return {"config": {**EARLY, **more}}


def resrep(scale: Scale) -> list[dict[str, Any]]:
    """Rows to forget are chosen in a sixth of the steps; the cut comes when those that nothing opposes have vanished.

    In an eighth of the steps by a high rate, in four tenths by a moderate one, or with a pull at forgotten rows alone,
    all of which are chosen within a tenth, or, ranked for longer by a low rate, within a quarter.
    """
    momentum = 0.9
    pace = {"compactor_momentum": momentum, "mask_interval_steps": max(1, scale.steps // 200)}
    few, many = max(1, scale.units // 56), max(1, scale.units // 19)

    def setting(rate: float, vanish: float, **more: Any) -> dict[str, Any]:
        pull = (1 - momentum) / (rate * vanish * scale.steps)
        return {"config": {**pace, "compactor_lr": rate, "lasso_weight": pull, **more}}

    sparing = {"pull": "forgotten", "begin": 0.06, "end": 0.3, "begin_granularity": many}
    return [
        setting(0.5, 0.125, end=0.35, begin_granularity=few),
        setting(0.1, 0.4, end=0.65, begin_granularity=few),
        setting(0.1, 0.125, **sparing),
        setting(0.01, 0.125, **sparing),
        setting(0.01, 0.25, **{**sparing, "begin": 0.15, "end": 0.5}),
    ]


def gate_decorator(scale: Scale) -> list[dict[str, Any]]:
    """A Tock is a tenth of the steps, the five Ticks behind it are half of one; after seven tenths only tuning."""
    pace = {"end": 0.7, "tock_steps": scale.steps // 10, "tick_steps": max(1, scale.steps // 100), "ticks_per_tock": 5}
    return [{"config": {**pace, "residual": False}, "training": {"lr_scheduler_type": "constant"}}]


def dmcp(scale: Scale) -> list[dict[str, Any]]:
    """A tenth of the steps trains all widths alike, two or four tenths the probabilities."""
    pace = {"begin": 0.1, "alpha_lr": min(5.0 * 1500 / scale.steps, 20.0), "residual": False}
    return [{"config": {**pace, "end": end}} for end in (0.5, 0.3)]


def bwcp(scale: Scale) -> list[dict[str, Any]]:
    """The random masks of a trained net, whose channels are off more than on, do harm: the less, the sooner they end.

    Whitening sets in over a fifth of the steps and masks end at seven tenths, or both are cut short.
    """
    own = {"lambda1": 1e-2, "lambda2": 1e-2, "residual": False}
    short = {"config": {**own, "ramp": 0.3, "begin": 0.0, "end": 0.2}}
    return [
        {"config": {**own, "ramp": 0.2, "begin": 0.1, "end": 0.7}},
        short,
        {**short, "training": {"learning_rate": 7e-4}},
    ]


def c2s2(scale: Scale) -> list[dict[str, Any]]:
    """The budget is wide, so that the goal stops the selection, and floors keep some layers from paying for all.

    Floors are in proportion to the goal, but for a twentieth of the multiply-adds that no width changes. A gate that
    nothing opposes falls by 0.8 in each of a layer's two rounds; a weak pull leaves a rank among those that fall.
    """
    rounds, spare = 2, (scale.goal - 0.05) / 0.45

    def setting(floor: float, pull: float, *, end: float, share: float) -> dict[str, Any]:
        pace = {"rounds": rounds, "select_share": share, "end": end}
        pace["gate_lr"] = 0.8 * rounds * scale.layers / (share * end * scale.steps)
        guard = {"tau_total": 1000.0, "guard_batches": 10, "order": "flops", "residual": False, "polar_weight": 0.0}
        return {"config": {**pace, **guard, "sparsity_weight": pull, "min_keep": round(floor * spare, 3)}}

    return [
        setting(0.45, 0.1, end=0.7, share=0.5),
        setting(0.45, 0.03, end=0.4, share=0.4),
        setting(0.3, 0.01, end=0.4, share=0.4),
    ]


def prunenet(scale: Scale) -> list[dict[str, Any]]:
    """The optimisation reads a fifth as many batches as training does."""
    pace = {**EARLY, "fit_batches": scale.steps // 5, "variance_batches": max(1, scale.steps // 20)}
    return [{"config": {**pace, "fit_lr": 2e-2}}]


def feature_relevance(scale: Scale) -> list[dict[str, Any]]:
    """Seven removals in the first half, or third, each measured on as many batches as a hundredth of the steps has."""
    fixed = {"include": "inner", "begin": 0.05, "calibration_batches": scale.steps // 100 + 1}
    return [{"config": {**fixed, "end": end}} for end in (0.5, 0.3)]


def snapshot_ensemble(scale: Scale) -> list[dict[str, Any]]:
    """All runs of the rounds, and the one that distils, share the steps evenly."""
    kept = {"include": "inner", "scope": "per_group"}
    return [
        {"config": {**kept, "rounds": rounds}, "training": {"max_steps": scale.steps // (rounds + 1)}}
        for rounds in (5, 2)
    ]


TRIALS: dict[str, Callable[[Scale], list[dict[str, Any]]]] = {
    "uniform L1": lambda scale: [early(scope="per_group", include="inner"), early(scope="per_group")],
    "global L1": lambda scale: [early(scope="global", include="inner")],
    "random": lambda scale: [early(scope="per_group", include="inner", score="random")],
    "resrep": resrep,
    "gate_decorator": gate_decorator,
    "dmcp": dmcp,
    "bwcp": bwcp,
    "c2s2": c2s2,
    "channel_similarity": lambda scale: [early(include="inner"), early(include="inner", scope="per_group")],
    "ezcrop": lambda scale: [early(include="inner"), early(include="inner", feature_map="read")],
    "prunenet": prunenet,
    "feature_relevance": feature_relevance,
    "snapshot_ensemble": snapshot_ensemble,
    "play_and_prune": lambda scale: [
        {"config": {"iteration_steps": max(1, scale.steps // 30), "lasso_weight": 1e-3, "end": 0.7}}
    ],
}
"""Row -> settings to choose from: fields of the config, and of the training arguments. Rows that are not here have
their config's defaults, and `EARLY` where the method could do without training.
"""


def rows() -> dict[str, str | None]:
    """Name of each row of the table that trains after pruning or while it prunes -> its method."""
    table: dict[str, str | None] = {"tuned": None, "uniform L1": "magnitude", "global L1": "magnitude"}
    table |= {"random": "magnitude", "Torch-Pruning": None}
    return table | {name: name for name in methods.METHODS if name != "magnitude" and has_channel_goal(name)}


def has_channel_goal(method: str) -> bool:
    return "target_flops" in methods.load(method).GOALS


def trials(row: str, scale: Scale) -> list[dict[str, Any]]:
    if row in TRIALS:
        return TRIALS[row](scale)
    method = rows()[row]
    if method is None:
        return [{}]
    when = {} if methods.load(method).NEEDS_TRAINING else EARLY
    return [{"config": {**when, "include": "inner"}}]


def pruning(cell: Cell) -> PruneConfig:
    """The config of the cell's method, with its goal."""
    setting = json.loads(cell["setting"]).get("config", {})
    include = {"include": TASKS[cell["task"]].inner} if setting.get("include") == "inner" else {}
    guarded = cell["row"] == "play_and_prune"
    goal = {"max_metric_drop": TOLERANCE / 100} if guarded else {"target_flops": cell["goal"]}
    config = methods.load(SPECIAL.get(cell["row"]) or str(rows()[cell["row"]])).Config
    return config(**{**setting, **include, **goal, "seed": cell["seed"]})


def train_cell(cell: Cell) -> dict[str, Any]:
    """Train or prune one model; returns accuracy in percent, multiply-adds kept, widths and processor seconds."""
    with TemporaryDirectory() as folder:  # methods in rounds keep models there
        return train_in(Path(folder), cell)


def train_in(folder: Path, cell: Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = read(pixels_path(cell), json.loads(cell["setting"]).get("shift", 0))
    example = {"pixel_values": data["validation"].images[:2]}
    set_seed(cell["seed"])
    try:
        trainer = make_trainer(folder, cell, data, example)
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
    except (PruneError, ImportError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    if cell["row"] == "dense":
        trainer.save_model(str(dense_folder(cell)))
    dense_price = trace(TASKS[cell["task"]].build(), example).price().multiply_adds
    report = getattr(trainer, "report", None)
    return {
        "multiply_adds": trace(trainer.model.eval(), example).price().multiply_adds / dense_price,
        "seconds": round(seconds, 1),
        **{split: 100.0 * trainer.predict(data[split]).metrics["test_accuracy"] for split in ("validation", "test")},
        **({"widths": {name: f"{w['kept']}/{w['units']}" for name, w in report.layers.items()}} if report else {}),
        **({"run": report.run} if report and report.run else {}),
    }


def make_trainer(folder: Path, cell: Cell, data: dict[str, Pixels], example: dict[str, Tensor]) -> Trainer:
    run = {"max_steps": cell["steps"], "per_device_train_batch_size": cell["batch"], "seed": cell["seed"]}
    own = {"learning_rate": 5e-4, **json.loads(cell["setting"]).get("training", {})}
    common = {
        "args": training_arguments(folder, **{**run, **own}),
        "train_dataset": data["train"],
        "eval_dataset": data["validation"],
        "data_collator": whole,
        "compute_metrics": compute_metrics_for("accuracy"),
    }
    model = TASKS[cell["task"]].build() if cell["row"] in ("dense", FROM_SCRATCH) else reopen(cell)
    if cell["row"] == "Torch-Pruning":
        prune_by_torch_pruning(model, example["pixel_values"], cell["goal"])
    model.to(memory_format=torch.channels_last)  # convolutions of one thread run faster so
    if cell["row"] in ("dense", "tuned", "Torch-Pruning"):
        return Trainer(model=model, **common)
    return PruneTrainer(model=model, **common, pruning=pruning(cell))


def reopen(cell: Cell) -> PreTrainedModel:
    model = type(TASKS[cell["task"]].build()).from_pretrained(dense_folder(cell))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # transformers' MobileNetV2 has 0.997, by which the last batch alone would count
    return model


def prune_by_torch_pruning(model: nn.Module, images: Tensor, goal: float) -> None:
    """The same fraction of every group by mean L1 norm, the smallest at which the goal is met within a percent."""
    import torch_pruning as tp

    def pruned(net: nn.Module, fraction: float) -> nn.Module:
        head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
        importance = tp.importance.MagnitudeImportance(p=1)
        tp.pruner.MagnitudePruner(net, images, importance, pruning_ratio=fraction, ignored_layers=head).step()
        return net

    def price(net: nn.Module) -> float:
        return trace(net.eval(), {"pixel_values": images}).price().multiply_adds

    dense, low, high = price(model), 0.0, 1.0 - goal / 2
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if price(pruned(copy.deepcopy(model), middle)) <= goal * dense else (middle, high)
    pruned(model, high)


def pixels_path(size: dict[str, Any]) -> Path:
    return CACHE / "channel_methods" / f"{size['task']}-{size['rows']}.pt"


def dense_folder(cell: Cell) -> Path:
    return CACHE / "channel_methods" / f"{cell['task']}-{cell['rows']}-dense"


def dense_cell(task: str, quick: bool) -> Cell:
    size, setting = size_of(task, quick), json.dumps(TASKS[task].dense, sort_keys=True)
    run = {"rows": size["rows"], "batch": 64, "steps": size["dense_steps"], "setting": setting}
    return {"task": task, "row": "dense", "seed": 0, **run}


def size_of(task: str, quick: bool) -> dict[str, Any]:
    return TASKS[task].quick if quick else TASKS[task].full


def row_cell(task: str, row: str, goal: float, seed: int, trial: dict[str, Any], quick: bool) -> Cell:
    size = {key: value for key, value in size_of(task, quick).items() if key != "dense_steps"}
    return {"task": task, "row": row, "goal": goal, "seed": seed, **size, "setting": json.dumps(trial, sort_keys=True)}


def trial_cells(row: str, quick: bool) -> list[Cell]:
    """The cells among which a row's setting is chosen."""
    size = size_of("fashion", quick)
    settings = trials(row, scale_of("fashion", 0.5, size["steps"]))
    return [row_cell("fashion", row, 0.5, 0, setting, quick) for setting in settings]


def chosen(store: Store, row: str, quick: bool) -> int:
    """Which of the row's settings has the highest validation accuracy; of equal ones the first."""
    cells = trial_cells(row, quick)
    return int(np.argmax([store[cell].get("validation", -1.0) for cell in cells])) if len(cells) > 1 else 0


def row_cells(store: Store, task: str, row: str, goal: float, quick: bool, times: int = 1) -> list[Cell]:
    """One cell a seed, with the setting that was chosen, for `times` as many steps."""
    seeds, steps = (0,) if quick else TASKS[task].goals[goal], times * size_of(task, quick)["steps"]
    setting = trials(row, scale_of(task, goal, steps))[chosen(store, row, quick)]
    return [{**row_cell(task, row, goal, seed, setting, quick), "steps": steps} for seed in seeds]


def longer_cells(store: Store, quick: bool) -> list[Cell]:
    return [cell for row in LONGER_ROWS for cell in row_cells(store, "fashion", row, 0.5, quick, TIMES)]


def guarded_cells(quick: bool) -> list[Cell]:
    """Runs of half as many steps as the rows have."""
    steps = size_of("fashion", quick)["steps"] // 2
    (setting,) = trials("play_and_prune", scale_of("fashion", 0.5, steps))
    seeds = range(2 if quick else GUARDED_RUNS)
    return [
        {**row_cell("fashion", "play_and_prune", TOLERANCE, seed, setting, quick), "steps": steps} for seed in seeds
    ]


def scratch_cells(quick: bool) -> list[Cell]:
    """As the dense model trains, channels inside blocks alone, and six tenths of the steps tune what the cut leaves.

    The best of eight trials of 2400 steps, by validation: masks that end sooner, smaller rates, other pulls.
    """
    own = {"begin": 0.1, "end": 0.4, "lambda1": 1e-3, "lambda2": 1e-3, "residual": False}
    setting = json.dumps({"config": own, **TASKS["fashion"].dense}, sort_keys=True)
    dense = {**dense_cell("fashion", quick), "row": FROM_SCRATCH, "goal": SCRATCH_GOAL, "setting": setting}
    return [{**dense, "seed": seed} for seed in ((0,) if quick else SEEDS)]


def summarise(store: Store, quick: bool) -> dict[str, Any]:
    """The tables' numbers, from finished cells alone; what is not there yet is left out."""
    tables = {
        f"{task} {goal}": table(store, task, goal, quick)
        for task in TASKS
        for goal in TASKS[task].goals
        if dense_cell(task, quick) in store and not (quick and goal != 0.5)
    }
    if dense_cell("fashion", quick) in store and any(cell in store for cell in longer_cells(store, quick)):
        tables[f"fashion 0.5, {TIMES} times the steps"] = table(store, "fashion", 0.5, quick, TIMES)
    summary: dict[str, Any] = {"tables": tables, "sizes": {task: size_of(task, quick) for task in TASKS}}
    if dense_cell("fashion", quick) in store:
        dense = store[dense_cell("fashion", quick)]
        guarded, scratch = ([store[c] for c in cells(quick) if c in store] for cells in (guarded_cells, scratch_cells))
        if guarded:
            summary["play_and_prune"] = guard(guarded, dense)
        if scratch:
            summary[FROM_SCRATCH] = row_of(scratch, dense["test"])
    return summary | {"bars": dict(bars(summary))}


def table(store: Store, task: str, goal: float, quick: bool, times: int = 1) -> dict[str, dict[str, Any]]:
    dense = store[dense_cell(task, quick)]
    result: dict[str, dict[str, Any]] = {"dense": {"test": spread([dense["test"]]), "multiply_adds": spread([1.0])}}
    for row in rows() if times == 1 else LONGER_ROWS:
        if not all(cell in store for cell in trial_cells(row, quick)):
            continue
        done = [store[cell] for cell in row_cells(store, task, row, goal, quick, times) if cell in store]
        result[row] = row_of(done, dense["test"])
        failed = [each["failed"] for each in done if "failed" in each]
        if failed:
            result[row]["failed"] = failed[0]
    tuned = result.get("tuned", {}).get("seconds")
    for each in result.values():
        if tuned and each.get("seconds"):
            each["overhead"] = each["seconds"]["mean"] / tuned["mean"]
    return result


def row_of(done: Sequence[dict[str, Any]], dense: float) -> dict[str, Any]:
    done = [each for each in done if "failed" not in each]
    return {
        "test": spread([each["test"] for each in done]),
        "change": spread([each["test"] - dense for each in done]),
        "multiply_adds": spread([each["multiply_adds"] for each in done]),
        "seconds": spread([each["seconds"] for each in done]),
    }


def guard(done: Sequence[dict[str, Any]], dense: dict[str, Any]) -> dict[str, Any]:
    """How Play and Prune kept its tolerance, judged on the test rows that it never saw."""
    kept = [each["test"] >= dense["test"] - TOLERANCE for each in done if "failed" not in each]
    return {"runs": len(done), "kept": sum(kept), **row_of(done, dense["test"])}


def bars(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the methods should reach on Fashion-MNIST at half of the multiply-adds, and whether they do."""
    found = summary["tables"].get("fashion 0.5", {})
    uniform = (found.get("uniform L1", {}).get("test") or {}).get("mean")
    if found and uniform is not None:
        yield "dense at least 92 %", verdict(found["dense"]["test"]["mean"] - 92.0)
        for row, method in rows().items():
            value = found.get(row, {}).get("test")
            if method == row and value:
                yield f"{row} at least uniform L1 - {BELOW_UNIFORM}", verdict(value["mean"] - uniform + BELOW_UNIFORM)
    for name, found in summary["tables"].items():
        if name.startswith("fashion 0.5"):
            changes = {row: of["change"]["mean"] for row, of in found.items() if of.get("change")}
            when = name.removeprefix("fashion 0.5")
            if "resrep" in changes:
                yield f"resrep loses at most {RESREP_LOSS}{when}", verdict(changes["resrep"] + RESREP_LOSS)
            for row in ABOVE_UNIFORM if "uniform L1" in changes else ():
                if row in changes:
                    yield f"{row} at least uniform L1{when}", verdict(changes[row] - changes["uniform L1"])
    if FROM_SCRATCH in summary:
        change = summary[FROM_SCRATCH]["change"]
        yield f"{FROM_SCRATCH} loses at most {SCRATCH_LOSS}", verdict(change["mean"] + SCRATCH_LOSS)
    guarded = summary.get("play_and_prune")
    if guarded:
        needed = GUARDED_KEPT / GUARDED_RUNS * guarded["runs"]
        yield (
            f"play_and_prune within {TOLERANCE} in {GUARDED_KEPT} of {GUARDED_RUNS}",
            verdict(guarded["kept"] - needed),
        )


def verdict(margin: float) -> str:
    return f"{'met' if margin >= -1e-9 else 'MISSED'} by {abs(margin):.2f}"


def print_tables(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    for name, found in summary["tables"].items():
        shown = Table("model", "multiply-adds kept", "test accuracy, %", "change, points", "step time", title=name)
        for row, values in found.items():
            if "failed" in values:
                shown.add_row(f"{row}, failed", "-", values["failed"][:60], "-", "-")
                if not values["test"]:
                    continue
            columns = [spread_text(values.get(k), d) for k, d in (("multiply_adds", 3), ("test", 2), ("change", 2))]
            shown.add_row(row, *columns, f"{values['overhead']:.2f}" if "overhead" in values else "-")
        task = name.split()[0]
        console.print(shown, f"from one dense model: {summary['sizes'][task]}")
    if "play_and_prune" in summary:
        guarded = summary["play_and_prune"]
        console.print(
            f"play_and_prune, tolerance {TOLERANCE}: kept in {guarded['kept']} of {guarded['runs']} runs, change "
            f"{spread_text(guarded['change'], 2)}, multiply-adds kept {spread_text(guarded['multiply_adds'], 3)}"
        )
    if FROM_SCRATCH in summary:
        scratch = summary[FROM_SCRATCH]
        console.print(
            f"{FROM_SCRATCH}, in the dense model's steps: change {spread_text(scratch['change'], 2)}, "
            f"multiply-adds kept {spread_text(scratch['multiply_adds'], 3)}"
        )
    for name, value in summary["bars"].items():
        console.print(f"{name}: {value}")


def draw(summary: dict[str, Any], path: Path) -> None:
    """Accuracy over multiply-adds, one panel a task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TASKS if any(name.startswith(task) for name in summary["tables"])]
    if not tasks:
        return
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(7 * len(tasks), 5), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        found = [
            summary["tables"][name] for goal in TASKS[task].goals if (name := f"{task} {goal}") in summary["tables"]
        ]
        panel.axhline(found[0]["dense"]["test"]["mean"], color="grey", linestyle=":", label="dense")
        for place, row in enumerate(name for name in rows() if name != "tuned"):
            points = [each[row] for each in found if each.get(row, {}).get("test")]
            if points:
                panel.errorbar(
                    [point["multiply_adds"]["mean"] for point in points],
                    [point["test"]["mean"] for point in points],
                    yerr=[point["test"]["std"] for point in points],
                    marker="os^vDP*X"[place % 8], color=f"C{place % 10}", linewidth=1, capsize=2, label=row,
                )  # fmt: skip
        if task == "fashion" and summary.get("play_and_prune", {}).get("test"):
            guarded = summary["play_and_prune"]
            panel.plot(guarded["multiply_adds"]["mean"], guarded["test"]["mean"], "kh", label="play_and_prune")
        panel.set(title=task, xlabel="multiply-adds kept", ylabel="test accuracy, %")
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def tasks_at_hand(quick: bool) -> list[str]:
    """Tasks whose images, which are decoded, and pretrained model are installed."""
    found = []
    for task in TASKS:
        try:
            decode(TASKS[task].load, size_of(task, quick)["rows"], pixels_path(dense_cell(task, quick)))
            TASKS[task].build()
            found.append(task)
        except MissingPackage as missing:
            print(f"{task} is left out: {missing}", flush=True)
    return found


def run_all(
    store: Store, quick: bool, workers: int, only: Sequence[str], wanted: Sequence[str], goals: Sequence[str]
) -> None:
    tasks = [task for task in tasks_at_hand(quick) if task in wanted]
    dense = [dense_cell(task, quick) for task in tasks]
    for cell in dense:
        if not dense_folder(cell).exists():
            store.forget(cell)
    run(dense, train_cell, store, workers)
    ranked = [row for row in only if row in rows()]
    run([cell for row in ranked for cell in trial_cells(row, quick)], train_cell, store, workers)
    for task in tasks:
        for goal in (0.5,) if quick else [goal for goal in TASKS[task].goals if str(goal) in goals]:
            run([c for row in ranked for c in row_cells(store, task, row, goal, quick)], train_cell, store, workers)
    more = {"play_and_prune": guarded_cells, FROM_SCRATCH: scratch_cells, LONGER: partial(longer_cells, store)}
    for row, cells in more.items():
        if row in only and "fashion" in tasks:
            run(cells(quick), train_cell, store, workers)


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0], only=[*rows(), *SPECIAL, LONGER], goal=["0.5", "0.3"], task=list(TASKS)
    )
    store = open_store("channel_methods", options.quick)
    if not options.table:
        run_all(store, options.quick, options.workers, options.only, options.task, options.goal)
    summary = summarise(store, options.quick)
    store.write(summary=summary)
    print_tables(summary)
    draw(summary, (CACHE if options.quick else RESULTS) / "channel_methods.png")


if __name__ == "__main__":
    main()
