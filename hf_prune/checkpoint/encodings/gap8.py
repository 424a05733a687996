"""Values with the distance to each in one byte: the smaller encoding below one value in eight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_prune.checkpoint.encodings.memory import zeros_for
from hf_prune.types import CheckpointError


class Gap8:
    """Each kept value with the number of zeros before it, 0 to 255.

    A longer run of zeros is broken by storing every 256th of them as a value, so that each gap belongs to one value and
    decoding has no branch. Random zeros of 90 % hold such a run once in 10^11 values. Zeros at the end cost nothing.
    """

    sides: tuple[str, ...] = ("gaps",)

    def nbytes(self, kept: int, size: int, itemsize: int) -> int:
        """Bytes for `kept` values of `itemsize` bytes among `size`. Long runs, seldom and cheap, are not counted."""
        return kept * (itemsize + 1)

    def pack(self, flat: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`flat` (n,) of ints -> values (k,) and gaps (k,) of uint8."""
        positions = flat.nonzero().squeeze(1)
        zeros = positions.diff(prepend=positions.new_tensor([-1])) - 1
        fillers = zeros // 256
        rows = torch.arange(len(positions), device=flat.device).repeat_interleave(fillers + 1)
        # Within a run the fillers come first with a gap of 255; the value itself ends the run with what is left.
        gaps = torch.full_like(rows, 255)
        ends = (fillers + 1).cumsum(0) - 1
        gaps[ends] = zeros % 256
        return flat[(gaps + 1).cumsum(0) - 1], [gaps.to(torch.uint8)]

    def count(self, sides: Sequence[Tensor], size: int) -> int:
        """How many values the gaps place among `size`; `CheckpointError` where the last falls outside."""
        (gaps,) = sides
        end = int(gaps.sum(dtype=torch.int64)) + len(gaps)
        if end > size:
            raise CheckpointError(f"the gaps reach position {end}, but the tensor has {size} elements")
        return len(gaps)

    def unpack(self, values: Tensor, sides: Sequence[Tensor], size: int) -> Tensor:
        """Values (k,) and gaps (k,) -> the flat tensor, shape (size,)."""
        (gaps,) = sides
        # In int64 from the start: put_ takes no other index, and one in-place pass beats converting.
        positions = gaps.long().add_(1).cumsum_(0).sub_(1)
        return zeros_for(values, size).put_(positions, values)
