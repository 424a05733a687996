"""Rewrites the tables of README.md from what the program and the benchmarks' results say.

    make docs                          # or: python docs/generate.py
    python docs/generate.py --check    # exits with 1 where README.md is behind

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_prune.cli.fields import describe
from hf_prune.config import GOALS, PruneConfig
from hf_prune.report.tables import methods_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def generate(text: str) -> str:
    """`text` with every marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def methods() -> str:
    rows = [
        (
            f"`{row['method']}`",
            row["idea"],
            _link(row),
            ", ".join(f"`{goal}`" for goal in row["goals"]),
            "yes" if row["needs_training"] else "no",
            "" if row["status"] == "read" else row["status"],
        )
        for row in methods_table()
    ]
    return _table(("method", "idea", "paper", "goals", "needs training", "text"), rows)


def goals() -> str:
    fields = {field.name: field.help for field in describe(PruneConfig)}
    taken = {goal: [row["method"] for row in methods_table() if goal in row["goals"]] for goal in GOALS}
    rows = [(f"`{goal}`", fields[goal], ", ".join(taken[goal]) or "no method yet") for goal in GOALS]
    return _table(("goal", "what it is", "methods"), rows)


def storage() -> str:
    found = _results("storage")
    if found is None:
        return _absent("storage.py")
    plain = found["formats"]["none"]
    rows = [
        (
            name,
            f"{each['file_bytes'] / 1e6:.1f}",
            f"{plain['file_bytes'] / each['file_bytes']:.2f}",
            f"{each['encoder_weights_times_smaller']:.2f}",
            *(f"{times['load_and_first_forward_over_plain']:.2f}" for times in each["times"].values()),
        )
        for name, each in found["formats"].items()
    ]
    head = ("encoding", "file, MB", "times smaller", "pruned weights, times smaller", *plain["times"])
    about = (
        f"{found['parameters'] / 1e6:.1f}M parameters, {found['sparsity']:.0%} of the encoder's "
        f"{found['encoder_weights'] / 1e6:.1f}M removed; {found['machine']['processor']}, "
        f"{found['machine']['threads']} thread, torch {found['versions']['torch']}. The last columns: seconds to load "
        f"and run once, over those of the plain file; goal: {found['goal']}."
    )
    return f"{_table(head, rows)}\n\n{about} `{found['command']}`"


def movement_text() -> str:
    found = _results("movement_text")
    if found is None or "summary" not in found:
        return _absent("movement_text.py")
    accuracy = dict(found["summary"]["test_accuracy"])
    dense = accuracy.pop("dense")
    names = ("magnitude", "hard", "soft")
    gains = ("hard - magnitude", "soft - magnitude")
    rows = [
        (sparsity, *(_spread(row.get(name)) for name in names), *(_gain(row.get(name)) for name in gains))
        for sparsity, row in accuracy.items()
    ]
    head = ("removed", *(f"{name}, %" for name in names), *gains)
    about = (
        f"Dense: {_spread(dense)}. Test accuracy, mean ± standard deviation over seeds; differences in points with "
        "their 95 % interval, by bootstrap over rows and seeds."
    )
    return f"{_table(head, rows)}\n\n{about} `{found['command']}`"


def channel_methods() -> str:
    found = _results("channel_methods")
    if found is None or "summary" not in found:
        return _absent("channel_methods.py")
    head = ("model", "multiply-adds kept", "test accuracy, %", "change, points", "step time")
    shown = []
    for name, table in found["summary"]["tables"].items():
        if len(table) == 1:  # the dense model alone
            continue
        rows = [
            (
                f"{row} (a seed failed)" if "failed" in of else row,
                _spread(of.get("multiply_adds"), 3),
                _spread(of.get("test"), 2),
                _spread(of.get("change"), 2),
                f"{of['overhead']:.2f}" if "overhead" in of else "-",
            )
            for row, of in table.items()
            if of.get("test")
        ]
        shown.append(f"{name}:\n\n{_table(head, rows)}")
    for name in ("play_and_prune", "bwcp from scratch"):
        if of := found["summary"].get(name):
            change, kept = _spread(of["change"], 2), _spread(of["multiply_adds"], 3)
            shown.append(f"{name}: change {change} points, multiply-adds kept {kept}.")
    bars = "\n".join(f"- {bar}: {verdict}" for bar, verdict in found["summary"]["bars"].items())
    return "\n\n".join([*shown, f"What was to be reached, on Fashion-MNIST:\n\n{bars}", f"`{found['command']}`"])


def scores() -> str:
    found = _results("scores")
    if found is None or "summary" not in found:
        return _absent("scores.py")
    summary = found["summary"]
    weights = [
        (sparsity, method, _spread(row["test"]), _gain(row.get("gain")))
        for sparsity, methods in summary["weights"].items()
        for method, row in methods.items()
    ]
    channels = [
        (method, _spread(row["multiply_adds"], 3), _spread(row["before"]), _spread(row["test"], 2))
        for method, row in summary["channels"].items()
    ]
    rescaled = [
        (method, f"{row['as it was']:.1f}", f"{row['rescaled']:.1f}", str(row["differing weights"]))
        for method, row in summary["rescaled"].items()
    ]
    parts = [
        f"Movie sentiment, weights; dense: {_spread(summary['dense']['text dense'])} %.",
        _table(("removed", "method", "test accuracy, %", "points over magnitude (95 %)"), weights),
        f"Fashion-MNIST, channels inside blocks; dense: {_spread(summary['dense']['image dense'], 2)} %.",
        _table(("method", "multiply-adds kept", "before tuning, %", "test accuracy, %"), channels),
        "Half of the weights removed at once, from a model as it was and with one layer times 100, the next over 100:",
        _table(("method", "as it was, %", "rescaled, %", "weights whose mask differs"), rescaled),
        *(f"EZCrop's score takes {each['share']:.3f} of the time of a rank by SVD." for each in summary["cost"]),
        f"`{found['command']}`",
    ]
    return "\n\n".join(parts)


def training_methods() -> str:
    found = _results("training_methods")
    if found is None or "summary" not in found:
        return _absent("training_methods.py")
    columns = {"test": 2, "validation_after_the_cut": 2, "cost": 2, "step_time": 2}
    rows = [
        (name, *(_spread(row.get(key), digits) for key, digits in columns.items()))
        for name, row in found["summary"]["rows"].items()
    ]
    head = ("row", "test accuracy, %", "validation after the cut, %", "multiply-adds of training", "last / first step")
    claims = [f"- {claim}: {'-' if value is None else value}" for claim, value in found["summary"]["claims"].items()]
    return "\n\n".join([_table(head, rows), "\n".join(claims), f"`{found['command']}`"])


def zoo() -> str:
    found = _results("zoo")
    if found is None or "summary" not in found:
        return _absent("zoo.py")
    tools = list(found["summary"])
    rows = [(name, *(str(found["summary"][tool][name]) for tool in tools)) for name in found["summary"][tools[0]]]
    return f"{_table(('', *tools), rows)}\n\n`{found['command']}`"


def tracing() -> str:
    found = _results("tracing")
    if found is None:
        return _absent("tracing.py")
    rows = [
        (
            cell["model"],
            str(each["count"]),
            *(f"{each[part]:.2f}" for part in ("run", "scales", "groups")),
            f"{each['price_ms']:.2f}",
        )
        for cell, each in _cells(found)
    ]
    head = ("model", "groups", "one recorded run, s", "search for scales, s", "groups, s", "price of a plan, ms")
    return f"{_table(head, rows)}\n\n`{found['command']}`"


def speed() -> str:
    found = _results("speed")
    if found is None:
        return _absent("speed.py")
    rows = [
        (
            cell["model"],
            {"per_group": "same share of each group", "global": "uneven widths"}[cell["plan"]],
            cell["multiple"],
            *(f"{each[name]:.2f}" for name in ("multiply_adds_cut", "speed_up", "gain")),
            *(
                f"{each[name]:.2f}" if name in each else ""
                for name in ("peak_over_parameters", "peak_with_kept_blocks_over_parameters")
            ),
        )
        for cell, each in _cells(found)
    ]
    plans = ("model", "plan", "widths a multiple of", "multiply-adds cut", "speed-up", "gain")
    head = (*plans, "peak memory", "with freed blocks kept")
    ((variable, size),) = found["returned"].items()
    about = (
        f"Gain: speed-up over cut, goal {found['goals']['gain over multiply-add cut']}. Peak memory of loading and one "
        f"forward pass, over the parameters' bytes, goal {found['goals']['peak over parameter bytes']}, where freed "
        f"blocks go back to the system (glibc with `{variable}={size}`); by default glibc keeps some of them. "
    )
    return f"{_table(head, rows)}\n\n{about}`{found['command']}`"


def latency_goal() -> str:
    found = _results("latency_goal")
    if found is None:
        return _absent("latency_goal.py")
    rows = [
        (
            cell["model"],
            cell["scope"],
            cell["goal"],
            f"{each['measured_share']:.3f}",
            f"{each['off_by']:+.1%}",
            f"{each['multiply_adds_share']:.2f}",
        )
        for cell, each in _cells(found)
    ]
    head = ("model", "scope", "`target_latency`", "measured", "off by", "multiply-adds kept")
    return f"{_table(head, rows)}\n\n`{found['command']}`"


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods,
    "goals": goals,
    "storage": storage,
    "movement_text": movement_text,
    "channel_methods": channel_methods,
    "scores": scores,
    "training_methods": training_methods,
    "zoo": zoo,
    "tracing": tracing,
    "speed": speed,
    "latency_goal": latency_goal,
}


def _link(row: dict[str, Any]) -> str:
    return f"[{row['cite']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["cite"]


def _spread(value: dict[str, float] | None, digits: int = 1) -> str:
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f} (n={value['seeds']})" if value else "-"


def _gain(value: dict[str, float] | None) -> str:
    return f"{value['points']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]" if value else "-"


def _cells(found: dict[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Settings and result of each cell; the name that a result is kept under has the settings, without spaces."""
    for key, result in found["cells"].items():
        yield dict(part.split("=", 1) for part in key.split(" ")), result


def _results(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _absent(script: str) -> str:
    return f"Not complete yet: `python benchmarks/{script}` measures it."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    path = ROOT / "README.md"
    text = path.read_text()
    fresh = generate(text)
    if parser.parse_args().check:
        return int(fresh != text)
    path.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
