"""Options that several commands take, and the pruning config that a method's own options make."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
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
_DATA = typer.Option("--data", "-d", help="Name of a data set, CSV, TSV, JSON or parquet file, folder, or demo:NAME.")
Data = Annotated[str, _DATA]
DataToMeasure = Annotated[str | None, _DATA]
Subset = Annotated[str | None, typer.Option(help="Configuration of the data set, such as sst2 of glue.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the classes.")]
InputColumn = Annotated[list[str] | None, typer.Option(help="Column of the text or image; twice for a pair of texts.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Method = Annotated[str | None, typer.Option("--method", help="One of `hf-prune methods`.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="JSON file of a pruning config; options given beside it win.")
]


@dataclass(frozen=True)
class Pruning:
    """A method's config class and the values that were given for it, not yet checked."""

    config: type[PruneConfig]
    values: dict[str, Any]

    def make(self) -> PruneConfig:
        """The config. Raises where its values do not fit."""
        return self.config.from_dict(self.values)


def pruning_options(
    method: str | None, file: Path | None, words: list[str], **values: Any
) -> tuple[Pruning, list[str]]:
    """What a config file and command-line words say about the method, and the words that are no options of it.

    values: fields that other options have set.
    """
    from hf_prune import methods

    read = read_json(file, "--config") if file is not None else {}
    method = method or read.get("method")
    if method is None:
        raise typer.BadParameter("name a method with --method, one of `hf-prune methods`, or a file with --config.")
    config = methods.load(method).Config
    own, rest = parse(describe(config), words)
    return Pruning(config, {**read, **values, **own}), rest


def refuse(context: typer.Context, words: list[str], *configs: type) -> None:
    """Raise a usage error for the first of `words`, where there is one; the closest real option is named.

    configs: classes whose fields are options too.
    """
    if words:
        known = [name for parameter in context.command.params for name in parameter.opts]
        known += ["--" + each.name.replace("_", "-") for config in configs for each in fields(config)]
        raise typer.BadParameter(f"no such option: {words[0]}{closest(words[0], known)}")


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
