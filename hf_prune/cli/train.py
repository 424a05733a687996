"""`hf-prune train text|image`: fine-tune a model on labelled data, and prune it while it trains."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_prune.cli.fields import describe, parse
from hf_prune.cli.options import (
    ConfigFile,
    Data,
    InputColumn,
    LabelColumn,
    Method,
    Model,
    Output,
    Pruning,
    Subset,
    pruning_options,
    refuse,
)
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
RUN_FOLDERS = ("checkpoint-*", "round-*", "snapshot-*")
"""What a stopped run leaves in its output folder."""


def train(
    context: typer.Context,
    task: Annotated[Literal["text", "image"], typer.Argument(help="Classify texts (or pairs of texts), or images.")],
    model: Model,
    data: Data,
    output: Output,
    method: Method = None,
    config: ConfigFile = None,
    teacher: Annotated[
        str | None, typer.Option(help='Hub id or folder of a model to learn from, or "self": the model as it is now.')
    ] = None,
    metric: Annotated[str, typer.Option(help="accuracy, f1, or what evaluate.load finds.")] = "accuracy",
    average: Annotated[str | None, typer.Option(help="How f1 averages over classes: binary, macro, micro.")] = None,
    input_column: InputColumn = None,
    label_column: LabelColumn = None,
    subset: Subset = None,
    eval_data: Annotated[str | None, typer.Option(help="File of the validation rows.")] = None,
    test_data: Annotated[str | None, typer.Option(help="File of the test rows, scored once at the end.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Name of the split of validation rows.")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Training rows to use, and a quarter of it to score.")] = None,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens of a text that are read.")] = 128,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of an image's side, if not the model's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the data's order, a new head, dropout and the method; 0.")
    ] = None,
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
        pruning, words = pruning_options(method, config, words, **({"seed": seed} if seed is not None else {}))
    distillation, words = _distillation(words, teacher, pruning)
    arguments = _training_arguments(context, words, output, seed or 0, pruning)
    settings = pruning.make() if pruning is not None else None
    _check_output(output, resume, overwrite, arguments)
    source = Source(data, eval_data, test_data, subset, eval_split, label_column, rows)
    compute_metrics = compute_metrics_for(metric, **({"average": average} if average is not None else {}))
    prepared = _prepare(task, model, source, arguments, Reading(tuple(input_column or ()), max_length, image_size))
    trainer = _trainer(prepared, arguments, compute_metrics, settings, teacher, distillation)
    result = _run(trainer, prepared.splits.get("test"), resume)
    if trainer.is_world_process_zero():
        show(result, table(("result", ""), [(name, _shown(value)) for name, value in result.items()]), as_json=as_json)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _distillation(
    words: list[str], teacher: str | None, pruning: Pruning | None
) -> tuple[DistillConfig | None, list[str]]:
    from hf_prune.parts.distillation import DistillConfig

    values, rest = parse(describe(DistillConfig, "distill-"), words)
    if values and teacher is None:
        raise typer.BadParameter("the --distill options need a --teacher.")
    if teacher is not None and pruning is None:
        raise typer.BadParameter("--teacher goes with a --method; without one the model is only fine-tuned.")
    return (DistillConfig(**values) if teacher is not None else None), rest


def _training_arguments(
    context: typer.Context, words: list[str], output: Path, seed: int, pruning: Pruning | None
) -> TrainingArguments:
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise typer.BadParameter(message)

    given = [f"--{name}={value}" for name, value in {**DEFAULTS, "output_dir": output, "seed": seed}.items()]
    classes: Any = TrainingArguments
    parser: Any = Parser(classes, allow_abbrev=False)
    arguments, unknown = parser.parse_args_into_dataclasses([*given, *words], return_remaining_strings=True)
    refuse(context, unknown, TrainingArguments, *([pruning.config] if pruning is not None else []))
    if Path(str(arguments.output_dir)) != output:
        raise typer.BadParameter("the folder of the run is --output; leave --output-dir out.")
    return arguments


def _check_output(output: Path, resume: bool, overwrite: bool, arguments: TrainingArguments) -> None:
    """Raise unless the output folder has a run to go on with, or none; delete the checkpoints of one to replace."""
    from hf_prune.types import PruneError

    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite replaces it; choose one.")
    if output.exists() and not output.is_dir():
        raise PruneError(f"--output {str(output)!r} is a file; name a folder.")
    begun = [path for pattern in RUN_FOLDERS for path in output.glob(pattern)]
    if resume and not begun:
        raise PruneError(f"--resume: there is no checkpoint in {str(output)!r}; leave it out to begin a run.")
    if not (resume or overwrite) and (begun or (output / "config.json").exists()):
        raise PruneError(
            f"{str(output)!r} holds a run already: --resume goes on with it, --overwrite replaces it, "
            "or choose another --output."
        )
    if overwrite and arguments.should_save:  # else a later --resume might find them
        for stale in begun:
            shutil.rmtree(stale)


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
    for note in labelled.notes if arguments.process_index == 0 else ():
        typer.echo(f"hf-prune: {note}.", err=True)
    arguments.remove_unused_columns &= not chosen.lazy
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


def _run(trainer: Trainer, test: Any, resume: bool) -> dict[str, Any]:
    """Train, score, save; the numbers to show."""
    from hf_prune.cli.stopping import StopOnInterrupt
    from hf_prune.report.origin import scores

    stop, begin = StopOnInterrupt(), time.perf_counter()
    trainer.add_callback(stop)
    with stop.listening():
        trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - begin
    found = scores(trainer.evaluate(), "eval")
    if test is not None:
        found |= scores(trainer.evaluate(test, metric_key_prefix="test"), "test")
    trainer.save_model()
    trainer.save_state()
    report = getattr(trainer, "report", None)
    about = {"method": report.method, "sparsity": report.sparsity} if report is not None else {}
    assert trainer.model is not None
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {"output": trainer.args.output_dir, **about, "parameters": parameters, **found, "seconds": seconds}
