"""How near `target_latency` comes to its goal, on ResNet-50 and BERT-base shapes with one thread.

    python benchmarks/latency_goal.py            # writes benchmarks/results/latency_goal.json
    python benchmarks/latency_goal.py --quick    # tiny shapes: shows that it runs
    python benchmarks/latency_goal.py --table    # the finished cells

Each model is pruned by magnitude to a share of its dense latency; then the dense and the narrow one are timed in turn,
apart from the timing that the goal was fitted by. Goal: within 5 % of what was asked for. Run it on a quiet machine.
"""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any
from unittest import mock

import torch
from cells import Cell, Store, arguments, open_store, run
from shapes import INPUTS, build, forward

from hf_prune import MagnitudeConfig, prune
from hf_prune.timing import compare

TOLERANCE = 0.05


def measure(cell: Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, inputs = build(cell["model"], cell["quick"])
    dense = copy.deepcopy(model)
    # Two rows or more, so that the batch is told from sizes of 1; the goal is met for the batch that is given.
    example = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, HF_PRUNE_CACHE=folder):
        _, report = prune(model, MagnitudeConfig(target_latency=cell["goal"], scope=cell["scope"]), example)
    rounds = 5 if cell["quick"] else 31
    times = compare({"dense": forward(dense, example), "narrow": forward(model, example)}, rounds=rounds, least_ms=5.0)
    share = times["narrow"].median_ms / times["dense"].median_ms
    return {
        "measured_share": share,
        "off_by": share / cell["goal"] - 1.0,
        "within_tolerance": abs(share / cell["goal"] - 1.0) <= TOLERANCE,
        "dense_ms": vars(times["dense"]),
        "narrow_ms": vars(times["narrow"]),
        "multiply_adds_share": _multiply_adds(model, example) / _multiply_adds(dense, example),
        "parameters": report.parameters,
    }


def _multiply_adds(model: Any, inputs: Any) -> float:
    from hf_prune.graph import trace

    return trace(model, inputs).price().multiply_adds


def table(store: Store) -> str:
    lines = ["| model | scope | goal | measured | off by | multiply-adds |", "| --- | --- | --- | --- | --- | --- |"]
    for name, result in store.content["cells"].items():
        cell = dict(part.split("=") for part in name.split(" "))
        lines.append(
            f"| {cell['model']} | {cell['scope']} | {cell['goal']} | {result['measured_share']:.3f} | "
            f"{result['off_by']:+.1%} | {result['multiply_adds_share']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    store = open_store("latency_goal", options.quick)
    if not options.table:
        goals = (0.9,) if options.quick else (0.75, 0.5)
        cells = [
            {"model": model, "scope": scope, "goal": goal, "quick": options.quick}
            for model in INPUTS
            for scope in ("global", "per_group")
            for goal in goals
        ]
        run(cells, measure, store, workers=1)  # one at a time: they are timed
        store.write(tolerance=TOLERANCE)
    print(table(store))


if __name__ == "__main__":
    main()
