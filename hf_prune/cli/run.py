"""What every command runs in: errors as one sentence, exit codes, and a standard output that holds results alone."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from hf_prune.cli.output import results_apart

BAD_INPUT = 1
USAGE = 2
INTERRUPTED = 130


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with its exit codes: 1 and one sentence for bad input, 130 for Ctrl-C; 2 for usage is typer's own.

    What libraries print while it works goes to standard error; `output.show` writes to standard output.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with results_apart():
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as stop:
            fail(str(stop) or "stopped.", INTERRUPTED)
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if os.environ.get("HF_PRUNE_TRACEBACK"):
                raise
            fail(sentence(error), BAD_INPUT)

    return run


def sentence(error: BaseException) -> str:
    """The message of `error` in one line; the kind of error too where the message alone says little."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and " " in text:
        return text
    return f"{type(error).__name__}: {text} (HF_PRUNE_TRACEBACK=1 shows where it comes from)"


def fail(message: str, code: int) -> None:
    """Say it on standard error and end with `code`."""
    if "tqdm" in sys.modules:
        typer.echo(err=True)  # a progress bar may still hold the line
    typer.echo(f"hf-prune: {message}", err=True)
    raise typer.Exit(code)
