"""`hf-prune methods`: the table of methods, or all about one of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_prune.cli.output import Json, show, table


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its options, paper and notes.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or the options and the paper of one."""
    if name is None:
        _list(as_json)
    else:
        _describe(name, as_json)


def _list(as_json: bool) -> None:
    from hf_prune.report.tables import methods_table

    rows = methods_table()
    columns = ("method", "paper", "goals", "needs training", "text")
    cells = [
        (row["method"], row["cite"], ", ".join(row["goals"]), "yes" if row["needs_training"] else "no", row["status"])
        for row in rows
    ]
    show(rows, table(columns, cells), "hf-prune methods NAME shows the options of one.", as_json=as_json)


def _describe(name: str, as_json: bool) -> None:
    from dataclasses import asdict

    from hf_prune import methods as registry
    from hf_prune.cli.fields import describe, option_rows

    module = registry.load(name)
    fields = describe(module.Config)
    about: dict[str, Any] = {
        "method": name,
        "about": module.__doc__,
        "paper": asdict(module.PAPER),
        "goals": list(module.GOALS),
        "needs_training": module.NEEDS_TRAINING,
        "fields": [field.to_dict() for field in fields],
    }
    options = table(("option", "default", ""), option_rows(fields))
    show(about, module.__doc__, options, module.PAPER.bibtex, as_json=as_json)
