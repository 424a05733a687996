"""Tables that documents, cards and the command line show, made from what the program knows; nothing typed twice."""

from __future__ import annotations

from typing import Any

from hf_prune import methods
from hf_prune.types import Report


def methods_table() -> list[dict[str, Any]]:
    """One row a method of `METHODS`: its name, idea, paper, goals, status of the paper's text, whether it trains."""
    return [_row(name) for name in methods.METHODS]


def _row(name: str) -> dict[str, Any]:
    module = methods.load(name)
    paper = module.PAPER
    return {
        "method": name,
        "config": module.Config.__name__,
        "idea": _idea(module.__doc__ or ""),
        "title": paper.title,
        "cite": f"{_first_author(paper.authors)} {paper.year}",
        "arxiv": paper.arxiv,
        "status": paper.status,
        "goals": list(module.GOALS),
        "needs_training": module.NEEDS_TRAINING,
    }


def _idea(doc: str) -> str:
    """What a method's docstring says in its first sentence: after the name, without the source in brackets."""
    first = " ".join(doc.split("\n\n", 1)[0].split())
    return (first.partition(": ")[2] or first).partition(" (")[0].rstrip(".")


def _first_author(authors: str) -> str:
    names = [name.strip() for name in authors.replace(" and ", ", ").split(",") if name.strip()]
    return names[0].split()[-1] + (" et al." if len(names) > 1 else "")


def layers_table(report: Report) -> list[dict[str, Any]]:
    """One row a layer or group of a finished run: units before, kept, fraction removed."""
    return [
        {
            "layer": name,
            "structure": each["structure"],
            "units": each["units"],
            "kept": each["kept"],
            "removed": 1 - each["kept"] / each["units"],
        }
        for name, each in report.layers.items()
    ]
