"""Options that several commands take, and the pruning config that a method's own options make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_prune.cli.fields import describe, parse
from hf_prune.config import closest

if TYPE_CHECKING:
    from hf_prune.config import PruneConfig

OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command whose further options come from config classes."""

Model = Annotated[str, typer.Option("--model", "-m", help="Hub id or folder of the model, or demo:minilm.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Method = Annotated[str | None, typer.Option("--method", help="One of `hf-prune methods`.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="JSON file of a pruning config; options given beside it win.")
]


def pruning_config(
    method: str | None, file: Path | None, words: list[str], **values: Any
) -> tuple[PruneConfig, list[str]]:
    """The config of a file and of command-line words, and the words that are no options of the method.

    values: fields that other options have set.
    """
    from hf_prune import methods

    read = read_json(file, "--config") if file is not None else {}
    method = method or read.get("method")
    if method is None:
        raise typer.BadParameter("name a method with --method, one of `hf-prune methods`, or a file with --config.")
    own, rest = parse(describe(methods.load(method).Config), words)
    return methods.config_from_dict({**read, **values, **own, "method": method}), rest


def refuse(context: typer.Context, words: list[str], options: list[str]) -> None:
    """Raise a usage error for the first of `words`, where there is one; the closest real option is named.

    options: those that the command has beside its declared ones.
    """
    if words:
        known = [name for parameter in context.command.params for name in parameter.opts]
        raise typer.BadParameter(f"no such option: {words[0]}{closest(words[0], [*known, *options])}")


def read_json(file: Path, option: str) -> dict[str, Any]:
    """The JSON object in `file`."""
    from hf_prune.types import PruneError

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PruneError(f"{option}: there is no file {str(file)!r}.") from error
    except (OSError, ValueError) as error:
        raise PruneError(f"{option}: {str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise PruneError(f"{option}: {str(file)!r} must hold one JSON object, got a {type(values).__name__}.")
    return values
