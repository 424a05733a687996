"""Seedless splits: the hash of what could leak decides the split, another hash the order within it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One example. `key` identifies it and fixes its place; rows of the same `group` always share a split."""

    key: str
    group: str
    columns: dict[str, Any]


def normal(text: str) -> str:
    """`text` in lower case, with each run of anything but ASCII letters and digits as one space."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def split_of(group: str) -> str:
    """80 / 10 / 10 by the hash of the group."""
    bucket = int(_sha256(group)[:8], 16) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def shuffled(key: str) -> str:
    """Sort key of a shuffled but fixed order, so that the first N rows are a fair sample."""
    return _sha256("order:" + key)


def once(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows without those whose key came before."""
    seen = set()
    for row in rows:
        if row.key not in seen:
            seen.add(row.key)
            yield row


def split_limit(split: str, limit: int | None) -> int | None:
    """Rows to keep of a split: `limit` of train, a quarter of that number of the others; None keeps all."""
    if limit is None or split == "train":
        return limit
    return max(1, limit // 4)


def to_dataset_dict(name: str, rows: Iterable[Row], features: Features, limit: int | None) -> DatasetDict:
    """The rows as a `DatasetDict` with every split, each in its fixed shuffled order; reports call it `name`."""
    from datasets import DatasetDict

    parts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        parts[split_of(row.group)].append(row)
    result = DatasetDict()
    for split, part in parts.items():
        chosen = sorted(part, key=lambda row: shuffled(row.key))[: split_limit(split, limit)]
        columns = {column: [row.columns[column] for row in chosen] for column in features}
        result[split] = to_dataset(name, split, columns, features)
    return result


def to_dataset(name: str, split: str, columns: dict[str, list[Any]], features: Features) -> Dataset:
    """One split of the data set `name`, which knows that it is."""
    from datasets import Dataset, DatasetInfo, NamedSplit

    info = DatasetInfo(features=features, dataset_name=name)
    return Dataset.from_dict(columns, features=features, info=info, split=NamedSplit(split))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
