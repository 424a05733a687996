"""`hf-prune report`: plots of a finished run, and its numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.output import Json, show, table


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a pruned model, with pruning.json in it.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the plots; RUN/report.")] = None,
    as_json: Json = False,
) -> None:
    """Draw what a run pruned (sparsity of each layer, widths, heads) and how it trained; write it as JSON too."""
    from hf_prune.report.plots import draw
    from hf_prune.report.reading import read_history, read_report
    from hf_prune.report.tables import layers_table

    read, folder = read_report(run), output or run / "report"
    history = read_history(run)
    plots = draw(read, folder, history)
    rows = layers_table(read)
    result: dict[str, Any] = {
        "run": str(run),
        "method": read.method,
        "sparsity": read.sparsity,
        "parameters": read.parameters,
        "metrics": read.metrics,
        "layers": rows,
        "history": history,
        "plots": [str(path) for path in plots],
    }
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    cells = [(row["layer"], row["units"], row["kept"], f"{row['removed']:.1%}") for row in rows]
    title = f"{read.method}: {read.sparsity:.1%} of the prunable weights removed"
    written = "\n".join(["Written:", *result["plots"], str(folder / "report.json")])
    show(result, table(("layer", "units", "kept", "removed"), cells, title), written, as_json=as_json)
