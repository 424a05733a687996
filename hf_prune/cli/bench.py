"""`hf-prune bench`: how long models take, measured in turn on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_prune.cli.output import Json, show, table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_prune.timing import Timing


class Form(StrEnum):
    """How a model runs."""

    PLAIN = "plain"
    CHANNELS_LAST = "channels_last"
    COMPILE = "compile"


def bench(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids; the first is what the others are held to.")],
    form: Annotated[
        list[Form] | None, typer.Option(help="How the models run: plain, channels_last or compile; repeatable.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Threads of the CPU; repeatable. 1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a call.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 128,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of an image's side, if not the model's.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Times that each model is measured.")] = 15,
    save: Annotated[
        bool, typer.Option("--save", help="Put the times into pruning.json of the others, for their cards.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the latency of models in turn: median, lowest and highest of all rounds, and how much faster they are.

    hf-prune bench DENSE PRUNED
    """
    from hf_prune.checkpoint.load import load_pretrained
    from hf_prune.timing import compare, machine

    forms, counts = form or [Form.PLAIN], threads or [1]
    loaded = {name: load_pretrained(name).eval() for name in models}
    inputs = {name: _inputs(each, batch_size, length, image_size) for name, each in loaded.items()}
    calls = {
        (name, kind): FORMS[kind](each, inputs[name]) for kind in dict.fromkeys(forms) for name, each in loaded.items()
    }
    keys = {" ".join(key): key for key in calls}
    rows: list[dict[str, Any]] = []
    for count in counts:
        times = compare({label: calls[key] for label, key in keys.items()}, rounds=rounds, threads=count)
        found = {keys[label]: timing for label, timing in times.items()}
        rows += [_row(key, timing, count, found[models[0], key[1]]) for key, timing in found.items()]
    result = {
        "machine": machine(),
        "batch_size": batch_size,
        "inputs": {name: list(value.shape) for name, value in inputs[models[0]].items()},
        "rounds": rounds,
        "times": rows,
    }
    if save:
        _save(result, models, forms[0], counts[0])
    cells = [
        (row["model"], row["form"], row["threads"], *(f"{row[key]:.2f}" for key in _TIMES), f"{row['speedup']:.2f}")
        for row in rows
    ]
    columns = ("model", "form", "threads", "median, ms", "low", "high", "times faster")
    show(result, table(columns, cells, f"{result['machine']}, {rounds} rounds"), as_json=as_json)


_TIMES = ("median_ms", "low_ms", "high_ms")


def _row(key: tuple[str, str], timing: Timing, threads: int, reference: Timing) -> dict[str, Any]:
    speedup = reference.median_ms / timing.median_ms
    return {"model": key[0], "form": str(key[1]), "threads": threads, **asdict(timing), "speedup": speedup}


def _inputs(model: PreTrainedModel, batch: int, length: int, image_size: int | None) -> dict[str, Tensor]:
    """A batch of the kind and size that was asked for."""
    import torch

    from hf_prune.graph import example_inputs
    from hf_prune.types import PruneError

    example = example_inputs(model)
    most = getattr(model.config, "max_position_embeddings", None)
    if "input_ids" in example and most is not None and length > most:
        raise PruneError(f"--length: the model reads at most {most} tokens, got {length}.")
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, value in example.items():
        if value.ndim == 4:
            side = image_size or value.shape[-1]
            made[name] = torch.randn(batch, value.shape[1], side, side, generator=generator)
        else:
            columns = torch.arange(length) % value.shape[1]
            made[name] = value[:1, columns].expand(batch, length).contiguous()
    return made


def _plain(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    import torch

    @torch.inference_mode()
    def call() -> Any:
        return model(**inputs)

    return call


def _channels_last(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    import copy

    import torch

    turned: Any = copy.deepcopy(model)
    turned.to(memory_format=torch.channels_last)
    return _plain(
        turned,
        {
            name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
            for name, value in inputs.items()
        },
    )


def _compiled(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    import torch

    compiled: Any = torch.compile(model)
    return _plain(compiled, inputs)


FORMS: dict[Form, Callable[[PreTrainedModel, dict[str, Tensor]], Callable[[], Any]]] = {
    Form.PLAIN: _plain,
    Form.CHANNELS_LAST: _channels_last,
    Form.COMPILE: _compiled,
}
"""Form -> a function of no arguments that runs the model that way."""


def _save(result: dict[str, Any], models: list[str], form: str, threads: int) -> None:
    """Note the times of the first form and thread count in the reports of all models but the first."""
    from hf_prune.report.reading import read_report
    from hf_prune.types import PRUNING_FILE

    times = {
        row["model"]: {name: row[name] for name in _TIMES}
        for row in result["times"]
        if (row["form"], row["threads"]) == (form, threads)
    }
    inputs = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in result["inputs"].items())
    where = f"{result['machine']}, {threads} threads, {form}, {inputs}"
    for name in models[1:]:
        latency = {"machine": where, "dense": times[models[0]], "kept": times[name]}
        path = Path(name) / PRUNING_FILE
        fresh = path.with_suffix(".tmp")
        fresh.write_text(replace(read_report(name), latency=latency).to_json() + "\n", encoding="utf-8")
        fresh.replace(path)
