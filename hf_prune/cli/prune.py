"""`hf-prune prune`: prune a trained model at once, by a method that needs no training."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hf_prune.cli.options import (
    ConfigFile,
    DataToMeasure,
    InputColumn,
    LabelColumn,
    Method,
    Model,
    Output,
    Subset,
    pruning_options,
    refuse,
)
from hf_prune.cli.output import Json, show, table


def prune(
    context: typer.Context,
    model: Model,
    output: Output,
    method: Method = None,
    config: ConfigFile = None,
    encode: Annotated[str, typer.Option(help="How zeros are stored: auto, none, or one of the encodings.")] = "auto",
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Also write code that loads the model without hf_prune.")
    ] = False,
    data: DataToMeasure = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows of --data to measure scores on.")] = 256,
    label_column: LabelColumn = None,
    input_column: InputColumn = None,
    subset: Subset = None,
    as_json: Json = False,
) -> None:
    """Prune a trained model at once and save it; further options are those of the method (hf-prune methods NAME).

    Methods that measure their scores need --data.
    """
    import hf_prune
    from hf_prune import PruneError, methods
    from hf_prune.checkpoint.load import load_pretrained, load_processor
    from hf_prune.cli.data import Source
    from hf_prune.cli.tasks import Reading, batches_for
    from hf_prune.graph import example_inputs

    pruning, rest = pruning_options(method, config, list(context.args))
    refuse(context, rest, pruning.config)
    settings = pruning.make()
    if methods.load(settings.method).NEEDS_TRAINING:
        raise PruneError(f"method {settings.method!r} prunes while it trains: hf-prune train text|image.")
    loaded = load_pretrained(model).eval()
    batches = None
    if data is not None:
        source = Source(data, subset=subset, label_column=label_column, rows=rows)
        batches = batches_for(model, loaded, source, Reading(tuple(input_column or ())))
    _, report = hf_prune.prune(loaded, settings, example_inputs(loaded), data=batches)
    processor = load_processor(model)
    hf_prune.save_pretrained(
        loaded, output, report=report, encode=encode, standalone=standalone, processing_class=processor
    )
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    result: dict[str, Any] = {
        "output": str(output),
        "method": report.method,
        "sparsity": report.sparsity,
        "parameters_before": report.parameters["dense"],
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "file_bytes": size,
    }
    show(result, table(("result", ""), result.items()), as_json=as_json)
