"""Table names for a model of another class than the one saved: a bare encoder, or another head on it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

T = TypeVar("T")


def keep(name: str) -> str:
    """The name itself: the model has the tensors that were saved."""
    return name


def translation(names: Collection[str], known: Collection[str], prefix: str) -> Callable[[str], str]:
    """How `names` of a checkpoint read in a model that has the names `known`.

    They stay (`keep`), or lose or gain `prefix` (the model's `base_model_prefix`), whichever makes most of them known:
    all go the same way, as tensors do in transformers.
    """

    def strip(name: str) -> str:
        # A name of the head stays as it is, unknown to the bare model.
        return "" if name == prefix else name.removeprefix(f"{prefix}.")

    def add(name: str) -> str:
        return f"{prefix}.{name}" if name else prefix

    ways = (keep, strip, add) if prefix else (keep,)
    return max(ways, key=lambda way: sum(way(name) in known for name in names))


def rename(table: Mapping[str, T], way: Callable[[str], str], known: Collection[str]) -> dict[str, T]:
    """`table` under the names that `way` gives, without those that are not among `known`."""
    return {way(name): value for name, value in table.items() if way(name) in known}
