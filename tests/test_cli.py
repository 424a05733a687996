"""The command line: what it prints, how it fails, and that it does what the same calls in Python do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from tiny_cli import cli

from hf_prune import MovementConfig, methods
from hf_prune.cli.fields import describe, parse


def test_methods_lists_them_all() -> None:
    rows = cli("methods", "--json").result
    assert [row["method"] for row in rows] == list(methods.METHODS)
    assert all(name[:8] in cli("methods").out for name in methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_option_of_every_method_has_help(name: str) -> None:
    about = cli("methods", name, "--json").result
    assert [each["name"] for each in about["fields"]] == [each.name for each in fields(methods.load(name).Config)]
    assert all(each["help"] for each in about["fields"]), [e["name"] for e in about["fields"] if not e["help"]]


def _options() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "--final-sparsity 0.9 --variant soft", {"final_sparsity": 0.9, "variant": "soft"}
    yield "--final-sparsity=0.9 --block-shape 4 8", {"final_sparsity": 0.9, "block_shape": (4, 8)}
    yield "--include a.* --include b.*", {"include": ("a.*", "b.*")}
    yield "--no-freeze-embeddings --seed 3", {"freeze_embeddings": False, "seed": 3}
    yield "--freeze-embeddings=false", {"freeze_embeddings": False}


@pytest.mark.parametrize(("words", "values"), list(_options()))
def test_words_become_fields(words: str, values: dict[str, Any]) -> None:
    assert parse(describe(MovementConfig), words.split()) == (values, [])
