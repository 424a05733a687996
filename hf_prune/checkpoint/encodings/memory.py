"""Memory to decode into."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def zeros_for(values: Tensor, size: int) -> Tensor:
    """A flat tensor of `size` zeros with the dtype and device of `values`."""
    if size == 0 or not values.is_cpu:
        return values.new_zeros(size)
    # numpy asks the system for pages that are zero already, where torch writes the zeros: a third of the decoding time.
    return torch.from_numpy(numpy.zeros(size * values.element_size(), numpy.uint8)).view(values.dtype)
