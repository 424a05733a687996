"""Results on standard output: tables for people, or one JSON document."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


_results: ContextVar[TextIO] = ContextVar("_results")


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """Send what libraries print to standard error, so that standard output has what `show` prints and nothing else."""
    token = _results.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


def show(result: Any, *shown: Any, as_json: bool) -> None:
    """Print `result` as JSON, or the rich renderables `shown` instead."""
    out = _results.get(sys.stdout)
    if as_json:
        out.write(json.dumps(result, indent=2) + "\n")
        return
    from rich.console import Console

    # No markup: texts have brackets of their own.
    Console(file=out, highlight=False, markup=False).print(*shown, sep="\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Any:
    """A rich table; numbers are shown as they are, so format them first."""
    from rich.table import Table

    shown = Table(title=title)
    for column in columns:
        shown.add_column(column, overflow="fold")  # names of layers are long, and their ends matter
    for row in rows:
        shown.add_row(*map(str, row))
    return shown
