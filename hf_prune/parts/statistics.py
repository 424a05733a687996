"""What layers put out on calibration batches, as running means: no activation is kept, whatever the split into batches.

`Calibration` is the data; `gather` runs the model over batches of it and hands what each `Point` shows to a reducer,
a function that sums observations. Sums are double precision and cover every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_prune.graph.writers import LAYERS
from hf_prune.types import PruneError

K = TypeVar("K")

Batch = Mapping[str, Any]

Data = Iterable[Batch] | Callable[[], Iterable[Batch]]
"""Batches as the model takes them, or a function that opens them anew."""

Reducer = Callable[[Tensor], tuple[Tensor, int]]
"""Observations `(rows, C, *positions)` -> their sum, in any shape, and how many they count as."""


class Calibration:
    """The batches that scores are measured on, read from the start at every look."""

    def __init__(self, model: nn.Module, data: Data | None) -> None:
        self.model, self._data = model, data

    @property
    def given(self) -> bool:
        """Whether there is data at all."""
        return self._data is not None

    def batches(self, count: int) -> Iterator[dict[str, Any]]:
        """The first `count` batches, or all where there are fewer, on the model's device.

        Raises:
            PruneError: there is none.
        """
        assert self._data is not None  # `Pruner` refuses to attach without
        device, empty = next(self.model.parameters()).device, True
        for batch in islice(self._data() if callable(self._data) else self._data, count):
            empty = False
            yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        if empty:
            raise PruneError(
                "the calibration data has no batch: it is empty, or an iterator that was read before; give data= a "
                "list of batches or a DataLoader, which can be read again."
            )


@dataclass(frozen=True)
class Point:
    """Something to watch: what `module` puts out, or the first thing that it takes in."""

    module: str
    reduce: Reducer
    taken_in: bool = False


class RunningMean:
    """Mean of what a reducer makes of every observation so far, over all processes in the end."""

    def __init__(self, reduce: Reducer | None = None) -> None:
        self.reduce = reduce
        self.total: Tensor | None = None
        self.count = 0

    def update(self, observed: Tensor) -> None:
        """Add the observations of one batch."""
        assert self.reduce is not None
        self.add(*self.reduce(observed.detach()))

    def add(self, total: Tensor, count: int) -> None:
        """Add the sum of `count` observations."""
        total = total.to(widest(total.device))
        self.total = total if self.total is None else self.total + total
        self.count += count

    def result(self) -> Tensor:
        """Double precision, where the device has it.

        Raises:
            PruneError: nothing was observed.
        """
        if self.total is None:
            raise PruneError("nothing was observed; the model's forward pass never reached the layer.")
        total, count = self.total, torch.tensor(float(self.count), device=self.total.device)
        return sum_over_processes(total) / sum_over_processes(count)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of what every process of the run has; the values themselves where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what every process of the run has."""
    return sum_over_processes(values) / sum_over_processes(torch.ones((), device=values.device))


def widest(device: torch.device) -> torch.dtype:
    """The most precise type that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def gather(model: nn.Module, batches: Iterable[Batch], points: Mapping[K, Point]) -> dict[K, Tensor]:
    """The mean at each point, by the point's name. Runs the model as it is; its hooks are gone afterwards.

    Tokens that `attention_mask` rules out are no observations.
    """
    means = {name: RunningMean(point.reduce) for name, point in points.items()}
    masks: list[Tensor | None] = []

    def watch(point: Point, mean: RunningMean, module: nn.Module, taken: tuple[Any, ...], output: Any = None) -> None:
        observed = taken[0] if point.taken_in else output
        observed = observed[0] if isinstance(observed, tuple) else observed
        mean.update(_observations(observed, isinstance(module, LAYERS[:2]), masks[-1]))

    handles = []
    try:
        for name, point in points.items():
            module = model.get_submodule(point.module)
            handles.append(module.register_forward_hook(partial(watch, point, means[name])))
        for batch in batches:
            masks.append(batch.get("attention_mask"))
            model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return {name: mean.result() for name, mean in means.items()}


def _observations(observed: Tensor, channels_last: bool, mask: Tensor | None) -> Tensor:
    """`(rows, C, *positions)`: images as they are, of sequences one row a token."""
    if not channels_last or observed.ndim == 2:
        return observed
    valid = mask is not None and mask.shape == observed.shape[:2]
    return observed[mask.bool()] if valid else observed.flatten(0, -2)  # type: ignore[union-attr]


def rows(observed: Tensor) -> Tensor:
    """`(rows, C, *positions)` -> `(rows * positions, C)`, in single precision at least."""
    flat = observed.movedim(1, -1).flatten(0, -2)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def mean(observed: Tensor) -> tuple[Tensor, int]:
    """Of each channel, `(C,)`."""
    flat = rows(observed)
    return flat.sum(0, dtype=widest(flat.device)), len(flat)


def mean_absolute(observed: Tensor) -> tuple[Tensor, int]:
    """Mean absolute value of each channel, `(C,)`."""
    flat = rows(observed)
    return flat.abs().sum(0, dtype=widest(flat.device)), len(flat)


def second_moment(observed: Tensor) -> tuple[Tensor, int]:
    """Mean square of each channel, `(C,)`."""
    flat = rows(observed)
    return flat.square().sum(0, dtype=widest(flat.device)), len(flat)


def first_moments(observed: Tensor) -> tuple[Tensor, int]:
    """Mean and mean square of each channel, `(2, C)`; `mean_and_variance` takes them apart."""
    flat = rows(observed)
    flat = flat.to(widest(flat.device))
    return torch.stack([flat.sum(0), flat.square().sum(0)]), len(flat)


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """`(C,)` each from what `first_moments` gathered."""
    means, squares = moments
    return means, (squares - means.square()).clamp(min=0.0)


def active(observed: Tensor) -> tuple[Tensor, int]:
    """How often each channel is above zero, `(C,)` in [0, 1]."""
    flat = rows(observed)
    return (flat > 0).sum(0), len(flat)


def moments(observed: Tensor) -> tuple[Tensor, int]:
    """First and second moments together, `(C + 1, C + 1)`; `mean_and_covariance` takes them apart."""
    flat = rows(observed)
    flat = torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1).to(widest(flat.device))
    return flat.T @ flat, len(flat)


def mean_and_covariance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """`(C,)` and `(C, C)` from what `moments` gathered."""
    means = moments[:-1, -1]
    return means, moments[:-1, :-1] - torch.outer(means, means)
