"""`hf-prune inspect`: a model's groups, whether shrinking is exact, what it can spare, where magnitude misleads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_prune.cli.options import DataToMeasure, InputColumn, LabelColumn, Subset
from hf_prune.cli.output import Json, show, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_prune.cli.data import Source
    from hf_prune.graph import Graph
    from hf_prune.types import Group, LayerStack

EXACT = 1e-8
"""Largest difference of outputs in double precision, as a fraction of the largest output, that counts as none."""


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the model.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Also list which whole layers can go; runs the model twice a layer.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Shrink copies by random plans and compare them with masked ones.")
    ] = False,
    plans: Annotated[int, typer.Option(min=1, help="Random plans of --check.")] = 3,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Loss on --data with 10 to 90 % of each group removed.")
    ] = False,
    diagnose: Annotated[
        bool,
        typer.Option("--diagnose", help="Layers whose weights magnitude would choose badly, by the loss on --data."),
    ] = False,
    sparsity: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of weights that --diagnose removes.")
    ] = 0.9,
    data: DataToMeasure = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows of --data to measure the loss on.")] = 128,
    label_column: LabelColumn = None,
    input_column: InputColumn = None,
    subset: Subset = None,
    plot: Annotated[Path, typer.Option(help="PNG file of --sensitivity.")] = Path("sensitivity.png"),
    as_json: Json = False,
) -> None:
    """List the groups of a model: what can be removed together, what must stay and why.

    --check exits with 1 where a shrunk model computes something else than the masked one. --sensitivity keeps what it
    measured: the same command goes on where it was stopped.
    """
    from hf_prune.checkpoint.load import load_pretrained
    from hf_prune.cli.data import Source
    from hf_prune.graph import example_inputs, trace

    if (sensitivity or diagnose) and data is None:
        needing = "--sensitivity" if sensitivity else "--diagnose"
        raise typer.BadParameter(f"{needing} needs labelled rows: name them with --data.")
    loaded = load_pretrained(model).eval()
    graph = trace(loaded, example_inputs(loaded))
    groups = [*graph.groups.values(), *graph.frozen.values()]
    result: dict[str, Any] = {"model": model, "groups": [_describe(group) for group in groups]}
    shown = [_groups_table(result["groups"])]
    if layers:
        result["layers"] = [_describe_stack(stack) for stack in graph.stacks.values()]
        shown.append(_layers_table(result["layers"]))
    if check:
        result["check"] = _check(loaded, graph, plans)
        shown.append(f"Shrinking is {_exactness(result['check'])}.")
    source, columns = Source(str(data), subset=subset, label_column=label_column, rows=rows), tuple(input_column or ())
    if diagnose:
        result["diagnosis"] = _diagnosis(model, loaded, source, columns, sparsity)
        shown.append(_diagnosis_table(result["diagnosis"], sparsity))
    if sensitivity:
        result["sensitivity"] = _sensitivity(model, loaded, graph, source, columns, plot)
        shown.append(_sensitivity_table(result["sensitivity"]))
        shown.append(f"Written: {plot}")
    show(result, *shown, as_json=as_json)
    if check and not result["check"]["exact"]:
        raise typer.Exit(1)


def _describe_stack(stack: LayerStack) -> dict[str, Any]:
    return {
        "name": stack.name,
        "layers": stack.size,
        "can_go": [layer.index for layer in stack.layers],
        "exact": not stack.normalised,
        "frozen": {str(index): reason for index, reason in stack.frozen.items()},
    }


def _layers_table(stacks: list[dict[str, Any]]) -> Any:
    rows = [
        (
            stack["name"],
            f"{len(stack['can_go'])} of {stack['layers']} can go",
            "; ".join(f"{index} stays: {reason}" for index, reason in stack["frozen"].items()),
            "" if stack["exact"] else "not exact: post-norm",
        )
        for stack in stacks
    ]
    return table(("stack", "layers", "", ""), rows, title="Whole layers")


def _describe(group: Group) -> dict[str, Any]:
    members = list(dict.fromkeys(member.tensor for member in group.members))
    return {
        "name": group.name,
        "role": group.role,
        "size": group.size,
        "members": members,
        "normalised": group.normalised,
        "frozen": group.frozen,
    }


def _groups_table(groups: list[dict[str, Any]]) -> Any:
    def note(group: dict[str, Any]) -> str:
        return (
            f"stays: {group['frozen']}" if group["frozen"] else "not exact: normalised" if group["normalised"] else ""
        )

    cells = [
        (group["name"], group["role"], group["size"], _shortened(group["members"]), note(group)) for group in groups
    ]
    return table(("group", "role", "size", "tensors", ""), cells)


def _shortened(members: list[str]) -> str:
    return ", ".join(members[:3]) + (f" and {len(members) - 3} more" if len(members) > 3 else "")


def _check(model: PreTrainedModel, graph: Graph, plans: int) -> dict[str, Any]:
    """Largest relative difference over random plans, in double precision."""
    import copy

    import torch

    from hf_prune.graph.trace import call, distinct_tensors
    from hf_prune.graph.verify import check_exactness, random_plan

    double = copy.deepcopy(model).double()
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in dict(graph.inputs).items()
    }
    exact = [group for group in graph.groups.values() if not group.normalised]
    with torch.no_grad():
        largest = max(float(each.abs().max()) for each in call(double, distinct_tensors(double), inputs))
    found = max(check_exactness(double, inputs, random_plan(exact, seed=seed)) for seed in range(plans))
    return {
        "plans": plans,
        "groups": len(exact),
        "normalised": len(graph.groups) - len(exact),
        "difference": found / largest,
        "exact": found / largest <= EXACT,
    }


def _exactness(check: dict[str, Any]) -> str:
    what = "exact" if check["exact"] else "NOT exact"
    return (
        f"{what}: outputs differ by {check['difference']:.1e} of the largest, over {check['plans']} random plans of "
        f"{check['groups']} groups ({check['normalised']} normalised ones left out)"
    )


def _diagnosis(
    name: str, model: PreTrainedModel, source: Source, columns: tuple[str, ...], sparsity: float
) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from hf_prune.cli.tasks import Reading, batches_for
    from hf_prune.methods.weight_importance import diagnose

    batches = [dict(batch) for batch in batches_for(name, model, source, Reading(columns))]
    found = diagnose(model, batches, sparsity=sparsity, batches=len(batches))
    return [{**asdict(each), "warning": each.warning} for each in found]


def _diagnosis_table(found: list[dict[str, Any]], sparsity: float) -> Any:
    columns = ("layer", "by magnitude", "by Fisher", "correlation", "loss without", "")
    cells = [
        (
            each["layer"],
            f"{each['kept_by_magnitude']:.1%}",
            f"{each['kept_by_fisher']:.1%}",
            f"{each['correlation']:.2f}",
            f"{each['natural']:+.3f}",
            each["warning"] or "",
        )
        for each in found
    ]
    return table(columns, cells, f"What stays of each layer with {sparsity:.0%} of all weights removed")


def _sensitivity(
    name: str, model: PreTrainedModel, graph: Graph, source: Source, columns: tuple[str, ...], plot: Path
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from hf_prune.cache import cache_file, read_cache, write_cache
    from hf_prune.cli.tasks import Reading, batches_for
    from hf_prune.report.plots import line_plot, save
    from hf_prune.report.sensitivity import DENSE, RATIOS, Losses, fingerprint, key, losses

    batches = [dict(batch) for batch in batches_for(name, model, source, Reading(columns))]
    kept = cache_file("sensitivity", fingerprint(model, batches))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("groups", total=len(graph.groups))

        def after_group(found: Losses) -> None:
            write_cache(kept, found)
            progress.advance(bar)

        found = losses(model, graph, batches, read_cache(kept), after_group)
    curves = {group: [found[key(group, ratio)] for ratio in RATIOS] for group in graph.groups}
    series = {group: ((0.0, *RATIOS), (found[DENSE], *values)) for group, values in curves.items()}
    save(line_plot(series, "fraction of units removed", "loss", "Sensitivity of each group"), plot)
    return {"dense_loss": found[DENSE], "ratios": list(RATIOS), "losses": curves, "plot": str(plot)}


def _sensitivity_table(found: dict[str, Any]) -> Any:
    columns = ("group", *(f"{ratio:.0%}" for ratio in found["ratios"]))
    cells = [(group, *(f"{loss:.3f}" for loss in losses)) for group, losses in found["losses"].items()]
    return table(columns, cells, f"Loss with a fraction of a group removed (dense: {found['dense_loss']:.3f})")
