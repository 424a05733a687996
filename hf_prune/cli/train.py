"""`hf-prune train text|image`: fine-tune a model on labelled data, and prune it while it trains."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_prune.cli.fields import describe, parse
from hf_prune.cli.options import ConfigFile, Method, Model, Output, pruning_config, refuse
from hf_prune.cli.output import Json, show, table

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from hf_prune.cli.data import Source
    from hf_prune.cli.tasks import Prepared, Reading
    from hf_prune.config import PruneConfig
    from hf_prune.parts.distillation import DistillConfig

DEFAULTS = {
    "learning_rate": "5e-5", "per_device_train_batch_size": "16", "per_device_eval_batch_size": "64",
    "warmup_steps": "0.1", "weight_decay": "0.01", "eval_strategy": "epoch", "save_strategy": "epoch",
    "save_total_limit": "1", "logging_steps": "20", "report_to": "none",
}  # fmt: skip
"""Training arguments that differ from transformers' own defaults."""


def train(
    context: typer.Context,
    task: Annotated[Literal["text", "image"], typer.Argument(help="Classify texts (or pairs of texts), or images.")],
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", help="Name of a data set, CSV, TSV, JSON or parquet file, folder, or demo:movie_sentiment."
        ),
    ],
    output: Output,
    method: Method = None,
    config: ConfigFile = None,
    teacher: Annotated[
        str | None, typer.Option(help='Hub id or folder of a model to learn from, or "self": the model as it is now.')
    ] = None,
    metric: Annotated[str, typer.Option(help="accuracy, f1, or what evaluate.load finds.")] = "accuracy",
    average: Annotated[str | None, typer.Option(help="How f1 averages over classes: binary, macro, micro.")] = None,
    input_column: Annotated[
        list[str] | None, typer.Option(help="Column of the text or image; twice for a pair of texts.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the classes.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="File of the validation rows.")] = None,
    test_data: Annotated[str | None, typer.Option(help="File of the test rows, scored once at the end.")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of the data set, such as sst2 of glue.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Name of the split of validation rows.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Training rows to use, and a quarter of it to score.")] = None,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens of a text that are read.")] = 128,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of an image's side, if not the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the data's order, a new head, dropout and the method.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the stopped run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model and prune it while it trains; without --method, only fine-tune it.

    Further options: those of the method (hf-prune methods NAME), --distill-temperature and the other fields of
    DistillConfig, and every field of transformers' TrainingArguments (--num-train-epochs 3, --learning-rate 5e-5).
    Ctrl-C stops after a checkpoint; the same command with --resume goes on.
    """
    from hf_prune.cli.data import Source
    from hf_prune.cli.tasks import Reading
    from hf_prune.metrics import compute_metrics_for

    words, pruning = list(context.args), None
    if method is not None or config is not None:
        pruning, words = pruning_config(method, config, words, seed=seed)
    distillation, words = _distillation(words, teacher, pruning)
    arguments = _training_arguments(context, words, output, seed)
    checkpoint = _checkpoint(output, resume, overwrite)
    source = Source(data, eval_data, test_data, subset, eval_split, label_column, rows)
    compute_metrics = compute_metrics_for(metric, **({"average": average} if average is not None else {}))
    prepared = _prepare(task, model, source, arguments, Reading(tuple(input_column or ()), max_length, image_size))
    trainer = _trainer(prepared, arguments, compute_metrics, pruning, teacher, distillation)
    result = _run(trainer, prepared.splits.get("test"), checkpoint)
    if trainer.is_world_process_zero():
        show(result, table(("result", ""), [(name, _shown(value)) for name, value in result.items()]), as_json=as_json)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _distillation(
    words: list[str], teacher: str | None, pruning: PruneConfig | None
) -> tuple[DistillConfig | None, list[str]]:
    from hf_prune.parts.distillation import DistillConfig

    values, rest = parse(describe(DistillConfig, "distill-"), words)
    if values and teacher is None:
        raise typer.BadParameter("the --distill options need a --teacher.")
    if teacher is not None and pruning is None:
        raise typer.BadParameter("--teacher goes with a --method; without one the model is only fine-tuned.")
    return (DistillConfig(**values) if teacher is not None else None), rest


def _training_arguments(context: typer.Context, words: list[str], output: Path, seed: int) -> TrainingArguments:
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise typer.BadParameter(message)

    given = [f"--{name}={value}" for name, value in {**DEFAULTS, "output_dir": output, "seed": seed}.items()]
    classes: Any = TrainingArguments
    parser: Any = Parser(classes, allow_abbrev=False)
    arguments, unknown = parser.parse_args_into_dataclasses([*given, *words], return_remaining_strings=True)
    refuse(context, unknown, ["--" + field.name.replace("_", "-") for field in fields(TrainingArguments)])
    if Path(str(arguments.output_dir)) != output:
        raise typer.BadParameter("the folder of the run is --output; leave --output-dir out.")
    return arguments


def _checkpoint(output: Path, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to go on from; None for a new run."""
    from transformers.trainer_utils import get_last_checkpoint

    from hf_prune.types import PruneError

    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite replaces it; choose one.")
    if output.exists() and not output.is_dir():
        raise PruneError(f"--output {str(output)!r} is a file; name a folder.")
    checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
    if resume and checkpoint is None:
        raise PruneError(f"--resume: there is no checkpoint in {str(output)!r}; leave it out to begin a run.")
    if not (resume or overwrite) and (checkpoint is not None or (output / "config.json").exists()):
        raise PruneError(
            f"{str(output)!r} holds a run already: --resume goes on with it, --overwrite replaces it, "
            "or choose another --output."
        )
    return checkpoint if resume else None


def _prepare(task: str, model: str, source: Source, arguments: TrainingArguments, reading: Reading) -> Prepared:
    from transformers import set_seed

    from hf_prune.cli.data import load_labelled
    from hf_prune.cli.models import model_path
    from hf_prune.cli.tasks import TASKS

    chosen = TASKS[task]
    with arguments.main_process_first(desc="preparing the data"):
        labelled = load_labelled(source, chosen.demos)
        set_seed(arguments.seed)  # of a new head
        path = model_path(model, Path(str(arguments.output_dir)) / "base")
        prepared = chosen.prepare(path, labelled, reading)
    for note in labelled.notes:
        typer.echo(f"hf-prune: {note}.", err=True)
    arguments.remove_unused_columns &= not chosen.reads_lazily
    return prepared


def _trainer(
    prepared: Prepared,
    arguments: TrainingArguments,
    compute_metrics: Any,
    pruning: PruneConfig | None,
    teacher: str | None,
    distillation: DistillConfig | None,
) -> Trainer:
    from transformers import Trainer

    from hf_prune import PruneTrainer

    common: dict[str, Any] = {
        "model": prepared.model, "args": arguments, "train_dataset": prepared.splits["train"],
        "eval_dataset": prepared.splits["validation"], "data_collator": prepared.collator,
        "processing_class": prepared.processing_class, "compute_metrics": compute_metrics,
    }  # fmt: skip
    if pruning is None:
        return Trainer(**common)
    return PruneTrainer(**common, pruning=pruning, teacher=teacher, distillation=distillation)


def _run(trainer: Trainer, test: Any, checkpoint: str | None) -> dict[str, Any]:
    """Train, score, save; the numbers to show."""
    from hf_prune.cli.stopping import StopOnInterrupt

    stop, begin = StopOnInterrupt(), time.perf_counter()
    trainer.add_callback(stop)
    with stop.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - begin
    scores = trainer.evaluate()
    if test is not None:
        scores |= trainer.evaluate(test, metric_key_prefix="test")
    kept = {
        name: value for name, value in scores.items() if not name.endswith(("_runtime", "_second", "_time", "epoch"))
    }
    report = getattr(trainer, "report", None)
    if report is not None:
        report.metrics.update(kept)
    trainer.save_model()
    trainer.save_state()
    about = {"method": report.method, "sparsity": report.sparsity} if report is not None else {}
    assert trainer.model is not None
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {"output": trainer.args.output_dir, **about, "parameters": parameters, **kept, "seconds": seconds}
