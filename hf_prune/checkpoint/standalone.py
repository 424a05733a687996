"""Code for a checkpoint folder, so that `trust_remote_code=True` loads it where hf_prune is not installed.

The code is that of this package, module after module with the imports gathered on top: nothing is written twice, and
nothing is generated but one subclass for each class that an Auto class may ask for.
"""

from __future__ import annotations

import ast
import importlib
import inspect

from transformers import PreTrainedModel

from hf_prune import __version__, types
from hf_prune.checkpoint.transformers_hook import auto_classes
from hf_prune.types import PruneError

MODULE_FILE = "modeling_hf_prune.py"

_TYPES = (types.PruneError, types.CheckpointError, types.ShapeTable)

_MODULES = (
    "graph.sizes",
    "graph.table",
    "graph.resize",
    "checkpoint.encodings.memory",
    "checkpoint.encodings.gap8",
    "checkpoint.encodings.bitmask",
    "checkpoint.encodings",
    "checkpoint.format",
    "checkpoint.files",
    "checkpoint.names",
    "checkpoint.transformers_hook",
)
"""What loading runs, in an order in which each uses only those before it. No two may define the same name."""


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """config.json's `auto_map`: for each Auto class that knows the config of `model`, a class of our module."""
    classes = auto_classes(type(model.config))
    if type(model).__name__ not in classes.values():
        raise PruneError(
            f"standalone=True needs a model of one of transformers' Auto classes, got {type(model).__name__}; "
            f"save with standalone=False."
        )
    return {auto: f"{MODULE_FILE.removesuffix('.py')}.{name}" for auto, name in classes.items()}


def module_source(model: PreTrainedModel) -> str:
    """The text of `MODULE_FILE` for the architecture of `model`."""
    sources = [inspect.getsource(importlib.import_module(f"hf_prune.{name}")) for name in _MODULES]
    imports = {("", "transformers")}.union(*map(_imports, [inspect.getsource(types), *sources]))
    bodies = [inspect.getsource(kind) for kind in _TYPES] + [_body(source) for source in sources]
    # The names are transformers' own, since pipelines and config.architectures go by the name of the class.
    bodies += [
        f'class {name}(transformers.{name}):\n    """transformers\' {name}, loaded narrow."""'
        for name in sorted(set(auto_classes(type(model.config)).values()))
    ]
    head = f'''"""Loads this folder without hf_prune {__version__}, from whose source it is put together."""

from __future__ import annotations

{_import_lines(imports)}
'''
    return "\n\n\n".join(text.strip() for text in [head, *bodies, "register()"]) + "\n"


def _imports(source: str) -> set[tuple[str, str]]:
    """(module, name) of every top-level import from outside hf_prune; the module is "" for `import name`."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {(getattr(node, "module", None) or "", alias.name) for node in nodes for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] not in ("__future__", "hf_prune")}


def _import_lines(imports: set[tuple[str, str]]) -> str:
    names: dict[str, list[str]] = {}
    for module, name in sorted(imports):
        names.setdefault(module, []).append(name)
    plain = [f"import {name}" for name in names.pop("", [])]
    return "\n".join(plain + [f"from {module} import {', '.join(found)}" for module, found in names.items()])


def _body(source: str) -> str:
    """A module without its docstring and its imports."""
    lines = source.splitlines()
    docstring, *nodes = ast.parse(source).body
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in [*reversed(imports), docstring]:
        del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines)
