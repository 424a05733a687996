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
from collections.abc import Callable, Iterable, Sequence
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
    rows = [(sparsity, *(_spread(row.get(name)) for name in names)) for sparsity, row in accuracy.items()]
    head = ("removed", *(f"{name}, %" for name in names))
    about = f"Dense: {_spread(dense)}. Test accuracy, mean ± standard deviation over seeds."
    return f"{_table(head, rows)}\n\n{about} `{found['command']}`"


def channel_methods() -> str:
    found = _results("channel_methods")
    if found is None or "summary" not in found:
        return _absent("channel_methods.py")
    head = ("model", "multiply-adds kept", "test accuracy, %", "change, points")
    shown = []
    for name, table in found["summary"]["tables"].items():
        rows = [
            (row, _spread(of["multiply_adds"], 3), _spread(of["test"], 2), _spread(of.get("change"), 2))
            for row, of in table.items()
        ]
        shown.append(f"{name}:\n\n{_table(head, rows)}")
    return "\n\n".join([*shown, f"`{found['command']}`"])


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods,
    "goals": goals,
    "storage": storage,
    "movement_text": movement_text,
    "channel_methods": channel_methods,
}


def _link(row: dict[str, Any]) -> str:
    return f"[{row['cite']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["cite"]


def _spread(value: dict[str, float] | None, digits: int = 1) -> str:
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f} (n={value['seeds']})" if value else "-"


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
