"""The table under `quantization_config` in config.json.

    {"quant_method": "hf_prune", "format_version": 1,
     "shapes": {tensor: [sizes]},                       tensors narrower than the config says
     "attributes": {module: {attribute: int or [ints]}},
     "buffers": {buffer: [places]},                     entries left of buffers that code makes
     "encodings": {tensor: {"kind": "gap8", "shape": [sizes], "dtype": "float32"}}}

It is data from strangers: types and names are checked here, sizes against the model in `graph.table` and against the
stored tensors in `files`, all before a tensor is allocated. What is not understood is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_prune.checkpoint.encodings import DTYPES, ENCODINGS
from hf_prune.graph.table import is_size, is_sizes, require_known
from hf_prune.types import CheckpointError, ShapeTable

QUANT_METHOD = "hf_prune"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Packed:
    """How one tensor is stored; `shape` and `dtype` are those it has when unpacked."""

    kind: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class CheckpointTable:
    """Everything that a checkpoint of ours says beside its config and its tensors."""

    narrow: ShapeTable = field(default_factory=ShapeTable)
    encodings: Mapping[str, Packed] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.narrow or self.encodings)


def to_dict(table: CheckpointTable) -> dict[str, Any]:
    """`table` as config.json holds it."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "shapes": {name: list(shape) for name, shape in table.narrow.shapes.items()},
        "attributes": {
            module: {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
            for module, attributes in table.narrow.attributes.items()
        },
        "buffers": {name: list(entries) for name, entries in table.narrow.buffers.items()},
        "encodings": {name: asdict(packed) | {"shape": list(packed.shape)} for name, packed in table.encodings.items()},
    }


def parse(raw: Mapping[str, Any]) -> CheckpointTable:
    """The inverse of `to_dict`. Raises `CheckpointError` for anything that `to_dict` would not write."""
    version = raw.get("format_version")
    if raw.get("quant_method") != QUANT_METHOD or not is_size(version):
        raise CheckpointError(
            f"quantization_config must say quant_method 'hf_prune' and an int format_version, "
            f"got {raw.get('quant_method')!r} and {version!r}."
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"This checkpoint has format_version {version}, this hf_prune reads {FORMAT_VERSION}; update hf_prune."
        )
    _require_keys("quantization_config", raw, to_dict(CheckpointTable()), required=False)
    shapes = {name: _shape(f"shapes[{name!r}]", shape) for name, shape in _mapping(raw, "shapes").items()}
    attributes = {
        module: {name: _attribute(f"attributes[{module!r}][{name!r}]", value) for name, value in named.items()}
        for module in _mapping(raw, "attributes")
        for named in [_mapping(raw["attributes"], module)]
    }
    buffers = {name: _shape(f"buffers[{name!r}]", entries) for name, entries in _mapping(raw, "buffers").items()}
    encodings = {name: _packed(name, _mapping(raw["encodings"], name)) for name in _mapping(raw, "encodings")}
    return CheckpointTable(ShapeTable(shapes, attributes, buffers), encodings)


def _packed(name: str, raw: Mapping[str, Any]) -> Packed:
    where = f"encodings[{name!r}]"
    _require_keys(where, raw, Packed.__dataclass_fields__, required=True)
    for key, known in (("kind", ENCODINGS), ("dtype", DTYPES)):
        if not isinstance(raw[key], str) or raw[key] not in known:
            raise CheckpointError(
                f"{where}.{key} must be one of {', '.join(known)}, got {raw[key]!r}; a newer hf_prune may know it."
            )
    shape = _shape(f"{where}.shape", raw["shape"])
    if len(shape) < 2:
        raise CheckpointError(f"{where}.shape must have two dimensions or more, got {list(shape)}.")
    return Packed(raw["kind"], shape, raw["dtype"])


def _shape(where: str, raw: Any) -> tuple[int, ...]:
    if not is_sizes(raw) or any(size < 0 for size in raw):
        raise CheckpointError(f"{where} must be a list of ints, none negative, got {raw!r}.")
    return tuple(raw)


def _attribute(where: str, raw: Any) -> int | tuple[int, ...]:
    return raw if is_size(raw) else _shape(where, raw)


def _mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{key} must be an object with string keys, got {value!r}.")
    return value


def _require_keys(where: str, raw: Mapping[str, Any], known: Collection[str], required: bool) -> None:
    require_known(raw, known, f"key in {where}:")
    if required and (missing := sorted(set(known) - raw.keys())):
        raise CheckpointError(f"{where} lacks {', '.join(missing)}.")
