"""Zeros that cannot be shrunk away, stored small: one class an encoding, one line of `ENCODINGS` each.

A packed tensor is a 1-D tensor of values under its own name and side tensors beside it (`<name>_gaps`). A program that
does not know the encoding meets a shape it does not expect and fails; under a new name the weight would stay random.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from hf_prune.checkpoint.encodings.bitmask import Bitmask
from hf_prune.checkpoint.encodings.gap8 import Gap8
from hf_prune.types import CheckpointError


class Encoding(Protocol):
    """What `ENCODINGS` holds. Values are the kept elements in order, shape (k,); side tensors are 1-D uint8."""

    sides: tuple[str, ...]
    """Suffix of each side tensor, in the order in which the methods give and take them."""

    def nbytes(self, kept: int, size: int, itemsize: int) -> int:
        """Bytes that values and sides take together."""

    def pack(self, flat: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`flat` of signed ints, shape (size,), -> values and side tensors."""

    def count(self, sides: Sequence[Tensor], size: int) -> int:
        """How many values the sides place; raises `CheckpointError` where they cannot belong to `size` elements."""

    def unpack(self, values: Tensor, sides: Sequence[Tensor], size: int) -> Tensor:
        """The flat tensor, shape (size,); any dtype of values, on their device."""


ENCODINGS: dict[str, Encoding] = {"gap8": Gap8(), "bitmask": Bitmask()}

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}
"""Dtypes that can be packed, by torch's name and safetensors' name."""

OVERHEAD_BYTES = 256
"""What a second tensor costs in the file's header and in config.json, roughly."""

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def choose(tensor: Tensor, kinds: Collection[str] = tuple(ENCODINGS)) -> str | None:
    """The one of `kinds` that stores `tensor` smallest, or None where plain is smaller or the tensor cannot be packed.

    It can with two dimensions or more (a 1-D one would look like its own values) and a dtype of `DTYPES`.
    """
    if tensor.ndim < 2 or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        return None
    kept, size, itemsize = int(_bits(tensor).count_nonzero()), tensor.numel(), tensor.element_size()
    nbytes = {kind: ENCODINGS[kind].nbytes(kept, size, itemsize) for kind in kinds}
    kind = min(nbytes, key=nbytes.__getitem__)
    return kind if nbytes[kind] + OVERHEAD_BYTES < size * itemsize else None


def encode(tensor: Tensor, kind: str) -> dict[str, Tensor]:
    """`tensor` as values under `""` and side tensors under `"_<suffix>"`, all 1-D.

    Zeros are compared bit by bit: -0.0 is kept as a value, so decoding gives back every bit.
    """
    values, sides = ENCODINGS[kind].pack(_bits(tensor))
    suffixes = [f"_{suffix}" for suffix in ENCODINGS[kind].sides]
    return {"": values.view(tensor.dtype), **dict(zip(suffixes, sides, strict=True))}


def decode(kind: str, stored: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The inverse of `encode`; values may have been cast since. Raises `CheckpointError` where the parts disagree."""
    sides = [stored[f"_{suffix}"] for suffix in ENCODINGS[kind].sides]
    check_counts(kind, len(stored[""]), sides, shape)
    return ENCODINGS[kind].unpack(stored[""], sides, prod(shape)).view(*shape)


def check_counts(kind: str, values: int, sides: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Raise `CheckpointError` unless the side tensors place exactly `values` values into `shape`."""
    placed = ENCODINGS[kind].count(sides, prod(shape))
    if placed != values:
        raise CheckpointError(f"{kind} places {placed} values, but {values} are stored")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(_INTS[tensor.element_size()])
