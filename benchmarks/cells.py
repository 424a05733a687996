"""Runs a benchmark's cells in parallel one-thread processes, each finished cell kept, so that a benchmark resumes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent / "cache"

Cell = dict[str, Any]


def key(cell: Cell) -> str:
    """The cell's settings as one line: the name under which its result is kept."""
    return " ".join(f"{name}={cell[name]}" for name in sorted(cell))


class Store:
    """Results by cell in one JSON file, rewritten whole after each cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"cells": {}}

    def __contains__(self, cell: Cell) -> bool:
        return key(cell) in self.content["cells"]

    def __getitem__(self, cell: Cell) -> dict[str, Any]:
        return self.content["cells"][key(cell)]

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        self.content["cells"][key(cell)] = result
        self.write()

    def forget(self, cell: Cell) -> None:
        """Have the cell run again, as where a model that it trained, and others need, is no longer there."""
        self.content["cells"].pop(key(cell), None)

    def write(self, **summary: Any) -> None:
        self.content.update(summary, command=f"python {sys.argv[0]}", environment=environment())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.content, indent=1) + "\n")
        fresh.replace(self.path)


def environment() -> dict[str, str]:
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
    }


def run(cells: Sequence[Cell], function: Callable[[Cell], dict[str, Any]], store: Store, workers: int) -> None:
    """Run every cell that `store` lacks, `workers` at a time; a failed cell stops the run, finished ones are kept."""
    waiting = [cell for cell in cells if cell not in store]
    if not waiting:
        return
    # Spawned processes read these before torch starts its threads.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    begin = time.perf_counter()
    with ProcessPoolExecutor(min(workers, len(waiting)), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(function, cell): cell for cell in waiting}
        for done, future in enumerate(as_completed(running), 1):
            cell = running[future]
            store.add(cell, future.result())
            print(f"[{done}/{len(waiting)}, {time.perf_counter() - begin:.0f} s] {key(cell)}", flush=True)


def arguments(description: str, **choices: Sequence[str]) -> argparse.Namespace:
    """What every benchmark of cells takes; `choices` are lists of which a run may do only some."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few rows, one seed: shows that it runs")
    parser.add_argument("--table", action="store_true", help="print the finished cells and stop")
    parser.add_argument("--workers", type=int, default=2, help="one-thread processes side by side")
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, metavar=name.upper())
    return parser.parse_args()


def open_store(name: str, quick: bool) -> Store:
    """The committed results, or those of quick runs, which stay out of the repository."""
    return Store(CACHE / f"{name}_quick.json" if quick else RESULTS / f"{name}.json")


def hits(store: Store, cell: Cell, split: str) -> np.ndarray:
    """0 or 1 for each row of `split`, in the data set's order."""
    return np.array([int(each) for each in store[cell]["correct"][split]])


def accuracy(store: Store, cell: Cell, split: str) -> float:
    """Percent of `split` that the cell's model got right."""
    return 100.0 * float(hits(store, cell, split).mean())


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, standard deviation over seeds, and how many there are."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "seeds": len(values)}


def spread_text(value: dict[str, float] | None, digits: int = 1) -> str:
    """`mean ± std (n=seeds)`."""
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f} (n={value['seeds']})" if value else "-"
