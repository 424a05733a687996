"""What half of the multiply-adds saves in time and memory: ResNet-50 and BERT-base shapes, dense beside shrunk.

    python benchmarks/speed.py            # writes benchmarks/results/speed.json
    python benchmarks/speed.py --quick    # tiny shapes: shows that it runs
    python benchmarks/speed.py --table    # the finished cells

Time: medians of interleaved rounds with one thread; the gain is the speed-up over the cut of multiply-adds, its goal
0.88. "per_group" plans keep the same share of every group, "global" ones the largest mean weights of all groups, which
are random here, so that widths are uneven for no reason. `multiple` is the config's `width_multiple`.
Memory: what a fresh process holds at its peak, while it loads the saved narrow model and runs it once, beyond what it
held after its imports, over the bytes of the parameters; the goal is 1.3. By default glibc keeps much of what a forward
pass frees, more or less of it from run to run; with a fixed `MALLOC_MMAP_THRESHOLD_` every large block goes back to the
system, and what is left is what model and activations need. Both are measured, the goal is judged on the second.
Beside it, what that peak is beyond the parameters, narrow and dense: activations, scratch memory and Python's objects,
negative where parameters are mapped but never touched. Run it on a quiet machine.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Store, arguments, open_store, run
from shapes import INPUTS, build, forward
from torch import Tensor, nn

from hf_prune import MagnitudeConfig, Pruner
from hf_prune.checkpoint import save_pretrained
from hf_prune.graph import shrink, trace
from hf_prune.timing import compare
from hf_prune.types import Plan

KEPT = 0.5
GOALS = {"gain over multiply-add cut": 0.88, "peak over parameter bytes": 1.3}
MULTIPLES = (1, 8, 16, 32)
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has glibc take blocks from this size on from the system, and give them back once freed."""


def half(model: nn.Module, inputs: Mapping[str, Tensor], scope: str, multiple: int) -> Plan:
    """The plan of magnitude pruning that keeps half of the multiply-adds; the model stays as it is."""
    config = MagnitudeConfig(target_flops=KEPT, scope=scope, width_multiple=multiple)
    pruner = Pruner(copy.deepcopy(model), config, inputs)
    pruner.attach()
    pruner.step(1, 1)
    return {name: keep.clone() for name, keep in pruner.plan.items()}


def measure(cell: Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, inputs = build(cell["model"], cell["quick"])
    graph = trace(model, {name: torch.cat([value, value]) for name, value in inputs.items()})
    plan = half(model, graph.inputs, cell["plan"], cell["multiple"])
    cut = graph.price().multiply_adds / graph.price(plan).multiply_adds
    narrow = copy.deepcopy(model)
    shrink(narrow, graph, plan)
    functions = {"dense": forward(model, inputs), "narrow": forward(narrow, inputs)}
    times = compare(functions, rounds=3 if cell["quick"] else 41, least_ms=5.0)
    speed_up = times["dense"].median_ms / times["narrow"].median_ms
    result = {
        "multiply_adds_cut": cut,
        "speed_up": speed_up,
        "gain": speed_up / cut,
        "dense_ms": vars(times["dense"]),
        "narrow_ms": vars(times["narrow"]),
        "kept": {name: f"{int(keep.sum())}/{len(keep)}" for name, keep in plan.items()},
    }
    if cell["multiple"] != 1:
        return result
    dense = {f"dense_{name}": value for name, value in memory(model, cell).items()}
    return {**result, **memory(narrow, cell), **dense}


def memory(model: Any, cell: Cell) -> dict[str, float]:
    """Peak of a process that opens the saved `model` and runs it once: with freed blocks returned, and as glibc is."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        command = [sys.executable, __file__, "--peak-of", folder, cell["model"], str(int(cell["quick"]))]

        def measured(settings: Mapping[str, str]) -> dict[str, float]:
            run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
            return json.loads(run.stdout.splitlines()[-1])

        kept = measured({})["peak_over_parameters"]
        return {**measured(RETURNED), "peak_with_kept_blocks_over_parameters": kept}


def peak(folder: str, name: str, quick: bool) -> dict[str, float]:
    """In a fresh process: bytes beyond the imports', of which loading and running a tiny model has made all."""
    tiny, given = build(name, True)
    with tempfile.TemporaryDirectory() as other:
        save_pretrained(tiny, other)
        forward(type(tiny).from_pretrained(other).eval(), given)()
    kind, inputs = type(tiny), INPUTS[name](quick)
    del tiny
    baseline = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    loaded = kind.from_pretrained(folder).eval()
    after_load = _status("VmHWM")
    forward(loaded, inputs)()
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    return {
        "parameter_bytes": size,
        "peak_after_load_over_parameters": (after_load - baseline) / size,
        "peak_over_parameters": (_status("VmHWM") - baseline) / size,
    }


def _status(field: str) -> int:
    """A line of what Linux says about this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def table(store: Store) -> str:
    lines = [
        "| model | plan | multiple | multiply-adds cut | speed-up | gain | peak | kept | beyond, MB | of dense |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in store.content["cells"].items():
        cell = dict(part.split("=") for part in name.split(" "))
        held, kept, beyond, beyond_dense = "-", "-", "-", "-"
        if "peak_over_parameters" in result:
            held, kept = (f"{result[f'peak_{of}over_parameters']:.2f}" for of in ("", "with_kept_blocks_"))
            beyond, beyond_dense = (
                f"{(result[f'{of}peak_over_parameters'] - 1) * result[f'{of}parameter_bytes'] / 1e6:.0f}"
                for of in ("", "dense_")
            )
        lines.append(
            f"| {cell['model']} | {cell['plan']} | {cell['multiple']} | {result['multiply_adds_cut']:.2f} | "
            f"{result['speed_up']:.2f} | {result['gain']:.2f} | {held} | {kept} | {beyond} | {beyond_dense} |"
        )
    return "\n".join(lines)


def main() -> None:
    if "--peak-of" in sys.argv:
        folder, name, quick = sys.argv[sys.argv.index("--peak-of") + 1 :]
        torch.set_num_threads(1)
        print(json.dumps(peak(folder, name, bool(int(quick)))))
        return
    options = arguments(__doc__.splitlines()[0])
    store = open_store("speed", options.quick)
    if not options.table:
        cells = [
            {"model": model, "plan": plan, "multiple": multiple, "quick": options.quick}
            for model in INPUTS
            for plan in ("per_group", "global")
            for multiple in (MULTIPLES[:2] if options.quick else MULTIPLES)
        ]
        run(cells, measure, store, workers=1)  # one at a time: they are timed
        store.write(goals=GOALS, returned=RETURNED)
    print(table(store))


if __name__ == "__main__":
    main()
