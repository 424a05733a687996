"""Pictures of a finished run: what went in each layer, widths, heads, and the curves of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.types import PruneError, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, REMOVED = "#2a6f97", "#d9d9d9"
ROW = 0.22
"""Inches that a layer takes in a plot with a row for each."""
SIDES = 1.2
"""Inches for title and axis."""

History = Sequence[Mapping[str, Any]]
"""`log_history` of a `trainer_state.json`: one entry a log, each with its `step`."""


def draw(report: Report, folder: str | Path, history: History = ()) -> list[Path]:
    """Write the plots that `report` and `history` have data for as PNG files in `folder`; returns their paths.

    `sparsity`: fraction removed of every layer. `widths`: units of every group before and after. `heads`: which heads
    of which layer stay. `curves`: loss, metrics and sparsity over optimizer steps.
    """
    folder = Path(folder)
    figures = {
        "sparsity": _sparsity(report),
        "widths": _widths(report),
        "heads": _heads(report),
        "curves": _curves(history),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in drawn]


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, the same bytes for the same picture."""
    figure.savefig(path, dpi=120, metadata={"Software": None})


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str, title: str
) -> Figure:
    """One line for each name -> (x, y) in `series`."""
    figure, (axes,) = _figure(7, 4.5)
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.legend(fontsize=6, ncols=1 + len(series) // 20)
    return figure


def _figure(width: float, height: float, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PruneError("plots need matplotlib: pip install 'hf-prune[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def _rows(names: Sequence[str], fill: Callable[[Axes, range], None], x_label: str, title: str) -> Figure:
    """A plot of one horizontal row for each name, the first on top."""
    figure, (axes,) = _figure(8, SIDES + ROW * len(names))
    places = range(len(names))
    fill(axes, places)
    axes.set(yticks=places, yticklabels=names, xlabel=x_label, title=title, ylim=(len(names) - 0.5, -0.5))
    axes.tick_params(axis="y", labelsize=7)
    return figure


def _sparsity(report: Report) -> Figure | None:
    layers = report.layers
    if not layers:
        return None
    removed = [1 - each["kept"] / each["units"] for each in layers.values()]

    def fill(axes: Axes, places: range) -> None:
        axes.barh(places, removed, color=KEPT)
        axes.set_xlim(0, 1)

    return _rows(
        list(layers),
        fill,
        "fraction of units removed",
        f"{report.method}: {report.sparsity:.1%} of the weights removed",
    )


def _widths(report: Report) -> Figure | None:
    groups = {name: each for name, each in report.layers.items() if "role" in each}
    if not groups:
        return None

    def fill(axes: Axes, places: range) -> None:
        axes.barh(places, [each["units"] for each in groups.values()], color=REMOVED, label="before")
        axes.barh(places, [each["kept"] for each in groups.values()], color=KEPT, label="after")
        axes.legend()

    return _rows(list(groups), fill, "units", "Widths before and after")


def _heads(report: Report) -> Figure | None:
    layers = {name: each for name, each in report.layers.items() if each.get("role") == "heads"}
    if not layers:
        return None
    most = max(each["units"] for each in layers.values())

    def fill(axes: Axes, places: range) -> None:
        for place, each in zip(places, layers.values(), strict=True):
            kept = set(each["indices"])
            colors = [KEPT if head in kept else REMOVED for head in range(each["units"])]
            axes.scatter(range(each["units"]), [place] * each["units"], c=colors, marker="s", s=60)
        axes.set(xlim=(-0.5, most - 0.5), xticks=range(most))

    return _rows(list(layers), fill, "head", "Attention heads that stay (dark) and go (light)")


def _curves(history: History) -> Figure | None:
    known = {name for entry in history for name, value in entry.items() if isinstance(value, (int, float))}
    scores = sorted(name for name in known if name.startswith("eval_") and not name.endswith(_COSTS))
    wanted = (["loss", "eval_loss"], [name for name in scores if name != "eval_loss"], ["sparsity"])
    panels = [here for names in wanted if (here := [name for name in names if name in known])]
    if not panels:
        return None
    figure, all_axes = _figure(7, SIDES + 2 * len(panels), rows=len(panels))
    for axes, names in zip(all_axes, panels, strict=True):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.legend(fontsize=8)
    all_axes[-1].set_xlabel("optimizer step")
    return figure


_COSTS = ("_runtime", "_per_second", "_time")
"""Ends of the names of logged numbers that say how long something took."""
