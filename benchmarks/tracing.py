"""How long it takes to find the groups of full-size models, and to price a plan.

    python benchmarks/tracing.py            # writes benchmarks/results/tracing.json; under a minute
    python benchmarks/tracing.py --quick    # one round
    python benchmarks/tracing.py --table    # only print what is there

One thread, medians over rounds, models on the meta device. "run": the recorded run of the model, which any tool that
looks at a graph must make. "scales": further recorded runs, by which attention scales are found. "groups": all else.
Goals: groups below 0.5 s, everything below 4 s, one price below 1 ms.
"""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from cells import Cell, Store, arguments, open_store, run
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    ConvNextConfig,
    ResNetConfig,
    ViTConfig,
)

from hf_prune.graph import example_inputs, trace
from hf_prune.graph.flow import Flow
from hf_prune.graph.groups import find_groups
from hf_prune.graph.scales import find_scales
from hf_prune.graph.trace import record

MODELS: dict[str, tuple[Any, Any]] = {
    "ResNet-50": (AutoModelForImageClassification, ResNetConfig),
    "ConvNeXt-tiny": (AutoModelForImageClassification, ConvNextConfig),
    "BERT-base": (AutoModelForSequenceClassification, BertConfig),
    "ViT-base": (AutoModelForImageClassification, ViTConfig),
}
COLUMNS = {"run": 2, "scales": 2, "groups": 2, "all": 2, "price_ms": 3}


def measure(cell: Cell) -> dict[str, Any]:
    """Seconds of each part, and milliseconds of one price."""
    torch.set_num_threads(1)
    kind, config = MODELS[cell["model"]]
    with torch.device("meta"):
        model = kind.from_config(config()).eval()
    inputs = example_inputs(model)
    trace(model, inputs)  # what torch and Python load at the first time is no part of it
    parts = [_parts(model, inputs) for _ in range(cell["rounds"])]
    graph = trace(model, inputs)
    plan = {name: torch.arange(group.size) % 2 == 0 for name, group in graph.groups.items()}
    graph.price(plan)
    begin = time.perf_counter()
    for _ in range(20):
        graph.price(plan)
    result = {name: median(each[name] for each in parts) for name in parts[0]}
    return {**result, "price_ms": (time.perf_counter() - begin) / 20 * 1e3, "count": len(graph.groups)}


def _parts(model: Any, inputs: Any) -> dict[str, float]:
    times = [time.perf_counter()]
    recorded = record(model, inputs)
    times.append(time.perf_counter())
    scales = find_scales(model, inputs, recorded)
    times.append(time.perf_counter())
    find_groups(Flow(recorded, *scales), {name for name, _ in model.named_parameters()})
    times.append(time.perf_counter())
    run, scaling, grouping = (after - before for before, after in pairwise(times))
    return {"run": run, "scales": scaling, "groups": grouping, "all": run + scaling + grouping}


def print_table(store: Store) -> None:
    shown = Table("model", "groups found", *(name.replace("_", ", ") for name in COLUMNS), title="Seconds to trace")
    for name, result in store.content["cells"].items():
        model = name.split("model=")[1].split(" ")[0]
        values = (f"{result[column]:.{digits}f}" for column, digits in COLUMNS.items())
        shown.add_row(model, str(result["count"]), *values)
    Console().print(shown)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    store = open_store("tracing", options.quick)
    if not options.table:
        rounds = 1 if options.quick else 7
        run([{"model": name, "rounds": rounds} for name in MODELS], measure, store, 1)
        store.write()
    print_table(store)


if __name__ == "__main__":
    main()
