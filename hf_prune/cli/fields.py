"""Command-line options made from config classes: names and types from the fields, help from the comments after them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import typer


@dataclass(frozen=True)
class Field:
    """One field of a config class as an option of the command line."""

    name: str
    type: Any
    default: Any
    help: str
    prefix: str = ""

    @property
    def option(self) -> str:
        """`final_sparsity` -> `--final-sparsity`."""
        return f"--{self.prefix}{self.name.replace('_', '-')}"

    @property
    def form(self) -> str:
        """How the option is written, with the kind of its values."""
        if self.type is bool:
            return f"{self.option} / --no-{self.option[2:]}"
        if typing.get_origin(self.type) is tuple and not self.repeats:
            return " ".join([self.option, *(_name(each) for each in typing.get_args(self.type))])
        return f"{self.option} {_name(self.item)}"

    @property
    def repeats(self) -> bool:
        """Whether the option may be given several times."""
        return typing.get_origin(self.type) is tuple and typing.get_args(self.type)[1:] == (Ellipsis,)

    @property
    def item(self) -> Any:
        """The type of one value."""
        return typing.get_args(self.type)[0] if self.repeats else self.type

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": self.name, "option": self.form, "default": self.default, "help": self.help}


def describe(config: type, prefix: str = "") -> list[Field]:
    """The fields of a config class in order; the comment of a parent class where a field has none of its own.

    prefix: before the name in the option, such as "distill-".
    """
    hints, comments = typing.get_type_hints(config), _comments(config)
    return [
        Field(each.name, _without_none(hints[each.name]), _default(each), comments.get(each.name, ""), prefix)
        for each in dataclasses.fields(config)
    ]


def option_rows(fields: Iterable[Field]) -> list[tuple[str, str, str]]:
    """Option, default and help of each field, for a table."""
    return [(field.form, _shown(field.default), field.help) for field in fields]


def parse(fields: Sequence[Field], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values that command-line words such as `--final-sparsity 0.9` give to `fields`, and the words left over.

    Raises:
        typer.BadParameter: a value of another type.
    """
    by_option: dict[str, tuple[Field, bool]] = {field.option: (field, True) for field in fields}
    by_option |= {"--no-" + field.option[2:]: (field, False) for field in fields if field.type is bool}
    values: dict[str, Any] = {}
    rest, unknown = list(words), []
    while rest:
        word = rest.pop(0)
        option, joined, value = word.partition("=")
        if option not in by_option:
            unknown.append(word)
            continue
        field, given = by_option[option]
        if joined:
            rest.insert(0, value)
        if field.type is bool:
            values[field.name] = _flag(field, rest) if joined else given
        elif field.repeats:
            values[field.name] = (*values.get(field.name, ()), *_take(field, rest, [field.item]))
        elif typing.get_origin(field.type) is tuple:
            values[field.name] = tuple(_take(field, rest, typing.get_args(field.type)))
        else:
            (values[field.name],) = _take(field, rest, [field.type])
    return values, unknown


def _take(field: Field, rest: list[str], kinds: Sequence[Any]) -> list[Any]:
    words = rest[: len(kinds)]
    if len(words) < len(kinds) or any(word.startswith("--") for word in words):
        raise typer.BadParameter(f"{field.option} needs {'a value' if len(kinds) == 1 else f'{len(kinds)} values'}.")
    del rest[: len(kinds)]
    return [_convert(field, word, kind) for word, kind in zip(words, kinds, strict=True)]


def _convert(field: Field, word: str, kind: Any) -> Any:
    try:
        return kind(word) if kind in (int, float, str) else json.loads(word)
    except ValueError:
        raise typer.BadParameter(f"{field.option} takes {_name(kind)}, got {word!r}.") from None


def _flag(field: Field, rest: list[str]) -> bool:
    word = rest.pop(0).lower()
    if word not in ("true", "false"):
        raise typer.BadParameter(f"{field.option} takes true or false, got {word!r}.")
    return word == "true"


def _comments(config: type) -> dict[str, str]:
    """Field name -> the comment on its lines, of a class and its parents."""
    found: dict[str, str] = {}
    for each in reversed(config.__mro__):
        if dataclasses.is_dataclass(each):
            found |= dict(_own_comments(each))
    return found


def _own_comments(config: type) -> Iterator[tuple[str, str]]:
    source = inspect.cleandoc("\n" + inspect.getsource(config))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
            if lines:
                yield node.target.id, " ".join(lines)


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [each for each in typing.get_args(hint) if each is not type(None)]
        return kinds[0] if len(kinds) == 1 else Any
    return hint


def _default(field: dataclasses.Field) -> Any:
    default = field.default if field.default is not dataclasses.MISSING else None
    return list(default) if isinstance(default, tuple) else default


def _shown(default: Any) -> str:
    if default in (None, "", []):
        return ""
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def _name(kind: Any) -> str:
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(kind, "JSON")
