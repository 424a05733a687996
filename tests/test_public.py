"""What `import hf_prune` offers and what it costs."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import hf_prune
from hf_prune import methods
from hf_prune.config import PruneConfig
from hf_prune.parts import schedules

HEAVY = ("torch", "transformers", "datasets", "evaluate", "scipy")


def test_importing_it_imports_nothing_heavy() -> None:
    code = f"import sys, hf_prune; print([name for name in {HEAVY!r} if name in sys.modules])"
    root = Path(hf_prune.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", hf_prune._EXPORTS)
def test_every_public_name_resolves(name: str) -> None:
    found = getattr(hf_prune, name)
    assert found.__name__ == name and found.__doc__
    assert name in dir(hf_prune)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_config_resolves_by_its_name(method: str) -> None:
    config = methods.load(method).Config
    assert getattr(hf_prune, config.__name__) is config
    assert issubclass(config, PruneConfig) and config.__doc__


@pytest.mark.parametrize("name", ["no_such_name", "NoSuchConfig", "Config", "pruner_", "__wrapped__"])
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'hf_prune' has no attribute '{name}'"):
        getattr(hf_prune, name)


def test_no_method_is_listed_twice() -> None:
    """A repeated key of a dict display silently wins, so the source is read."""
    tree = ast.parse(Path(methods.__file__).read_text())
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "METHODS"
    ]
    assert isinstance(table, ast.Dict)
    keys, modules = ([part.value for part in parts] for parts in (table.keys, table.values))
    assert len(set(keys)) == len(keys) and len(set(modules)) == len(modules)
    assert len({key.replace("_", "") for key in keys}) == len(keys), "two configs would have the same name"


def test_examples_in_the_schedules_are_right() -> None:
    result = doctest.testmod(schedules)
    assert result.attempted > 0 and result.failed == 0
