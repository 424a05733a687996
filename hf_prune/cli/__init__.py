"""The command line: `hf-prune`, or `python -m hf_prune`. One file a command; what they share is in three others.

run: what every command runs in, errors as one sentence and exit codes. output: results as tables or as JSON.
fields: options made from config classes, whose comments are the help.

Nothing here imports torch before a command runs, so that `hf-prune --help` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hf_prune.cli import bench, doctor, inspect, methods, prune, push, report, train
from hf_prune.cli.options import OWN_OPTIONS
from hf_prune.cli.run import guarded

app = typer.Typer(
    name="hf-prune",
    help="Prune Hugging Face models during or after fine-tuning, and save what is left as ordinary checkpoints.",
    epilog="Exit codes: 0 done, 1 bad input or a goal out of reach, 2 wrong usage, 130 stopped with Ctrl-C. "
    "HF_PRUNE_TRACEBACK=1 shows where an error comes from.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        import hf_prune

        typer.echo(hf_prune.__version__)
        raise typer.Exit


app.command("train", context_settings=OWN_OPTIONS)(guarded(train.train))
app.command("prune", context_settings=OWN_OPTIONS)(guarded(prune.prune))
app.command("inspect")(guarded(inspect.inspect))
app.command("report")(guarded(report.report))
app.command("bench")(guarded(bench.bench))
app.command("doctor")(guarded(doctor.doctor))
app.command("methods")(guarded(methods.methods))
app.command("push")(guarded(push.push))


def main() -> None:
    """Run the command that the arguments name."""
    app(prog_name="hf-prune")
