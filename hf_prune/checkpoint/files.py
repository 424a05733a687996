"""Whether the tensors on disk are what the table in config.json says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_prune.checkpoint.encodings import DTYPES, ENCODINGS, check_counts
from hf_prune.checkpoint.format import CheckpointTable, Packed
from hf_prune.types import CheckpointError


def check_files(table: CheckpointTable, model: Mapping[str, tuple[int, ...]], files: Iterable[str | Path]) -> set[str]:
    """Names of the tensors in `files`. Raises `CheckpointError` unless they are what `table` says.

    `table` uses the names on disk; `model` has the narrow shape of each tensor of the model, under its own name and
    under that on disk. Only headers and side tensors are read.
    """
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(_open(file))
            for name in handle.keys():  # noqa: SIM118  safe_open is no mapping
                if name in stored:
                    raise CheckpointError(f"{file}: tensor {name!r} is stored twice.")
                stored[name] = handle
        for name, packed in table.encodings.items():
            if name in model and packed.shape != model[name]:
                raise CheckpointError(
                    f"encodings[{name!r}] has shape {list(packed.shape)}, the model needs {list(model[name])}."
                )
            _check_packed(name, packed, stored, model)
        for name, shape in table.narrow.shapes.items():
            if name in stored and name not in table.encodings:
                _check_header(name, stored, list(shape), None)
        return set(stored)


def _check_packed(name: str, packed: Packed, stored: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Names, dtypes and sizes of one packed tensor, then what its side tensors hold."""
    sides = [f"{name}_{suffix}" for suffix in ENCODINGS[packed.kind].sides]
    if overlap := [side for side in sides if side in model]:
        raise CheckpointError(f"encodings[{name!r}]: its side tensor {overlap[0]!r} is also a tensor of the model.")
    for part in [name, *sides]:
        if part not in stored:
            raise CheckpointError(f"encodings[{name!r}]: tensor {part!r} is missing from the checkpoint.")
    kept = stored[name].get_slice(name).get_shape()
    if len(kept) != 1 or kept[0] > prod(packed.shape):
        raise CheckpointError(f"encodings[{name!r}]: values must be 1-D and fit {list(packed.shape)}, got {kept}.")
    _check_header(name, stored, kept, packed.dtype)
    for side in sides:
        _check_header(side, stored, stored[side].get_slice(side).get_shape()[:1], "uint8")
    try:
        check_counts(packed.kind, kept[0], [stored[side].get_tensor(side) for side in sides], packed.shape)
    except CheckpointError as error:
        raise CheckpointError(f"encodings[{name!r}]: {error}; the file is damaged, fetch or save it again.") from error


def _check_header(name: str, stored: Mapping[str, Any], shape: list[int], dtype: str | None) -> None:
    header = stored[name].get_slice(name)
    if header.get_shape() != shape or (dtype and header.get_dtype() != DTYPES[dtype]):
        raise CheckpointError(
            f"Tensor {name!r} is stored as {header.get_dtype()} {header.get_shape()}, config.json says "
            f"{dtype or 'any dtype'} {shape}; config and weights are from different saves."
        )


def _open(file: str | Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no whole safetensors file ({error}); fetch or save it again.") from error
