"""Values with one bit an element: the smaller encoding above one value in eight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_prune.checkpoint.encodings.memory import zeros_for
from hf_prune.types import CheckpointError


class Bitmask:
    """The kept values, and a bit for each element: bit i of byte b stands for element 8 b + i."""

    sides: tuple[str, ...] = ("bitmask",)

    def nbytes(self, kept: int, size: int, itemsize: int) -> int:
        """Bytes for `kept` values of `itemsize` bytes among `size`."""
        return kept * itemsize + -(-size // 8)

    def pack(self, flat: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`flat` (n,) of ints -> values (k,) and bitmask (n / 8,) of uint8, the last byte filled with zeros."""
        kept = flat != 0
        bits = pad(kept, (0, -len(kept) % 8)).view(-1, 8)
        powers = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)
        return flat[kept], [(bits * powers).sum(1, dtype=torch.uint8)]

    def count(self, sides: Sequence[Tensor], size: int) -> int:
        """How many values the bitmask places among `size`; `CheckpointError` where its length or end is wrong."""
        (bitmask,) = sides
        if len(bitmask) != -(-size // 8):
            raise CheckpointError(f"the bitmask has {len(bitmask)} bytes, but {size} elements need {-(-size // 8)}")
        flags = _flags(bitmask)
        if flags[size:].any():
            raise CheckpointError(f"the bitmask marks elements past the last of {size}")
        return int(flags.count_nonzero())

    def unpack(self, values: Tensor, sides: Sequence[Tensor], size: int) -> Tensor:
        """Values (k,) and bitmask (size / 8,) -> the flat tensor, shape (size,)."""
        (bitmask,) = sides
        return zeros_for(values, size).masked_scatter_(_flags(bitmask)[:size], values)


def _flags(bitmask: Tensor) -> Tensor:
    # One lookup a byte: row b of the table is the eight flags of byte b, read as a single int64.
    bits = torch.arange(256, device=bitmask.device).unsqueeze(1) >> torch.arange(8, device=bitmask.device) & 1
    rows = bits.to(torch.uint8).view(torch.int64).squeeze(1)
    return rows[bitmask.long()].view(torch.bool)
