"""Labelled rows from wherever the user has them: a `datasets` name, files, a folder, or the built-in demo data."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from hf_prune import demo_data
from hf_prune.config import closest
from hf_prune.types import PruneError

DEMO = "demo:"
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
HELD_OUT = 0.1
"""Share of the training rows that become validation rows where the data has none."""
LABEL_COLUMNS = ("label", "labels", "class")
VALIDATION_SPLITS = ("validation", "valid", "dev", "val")


@dataclass(frozen=True)
class Source:
    """Where rows come from. `data` is a name, a path or `demo:NAME`; the others may be left out.

    rows: training rows to keep, and a quarter of that number of the others.
    """

    data: str
    eval_data: str | None = None
    test_data: str | None = None
    subset: str | None = None
    eval_split: str | None = None
    label_column: str | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Labelled:
    """Rows with a column `labels` of class numbers, in the splits train, validation and perhaps test."""

    splits: DatasetDict
    names: list[str]
    """Of the classes, in the order of their numbers."""
    notes: tuple[str, ...] = ()
    """What was decided that the user did not ask for."""

    @property
    def label_names(self) -> dict[str, Any]:
        """What a model's config says about its classes."""
        return {"id2label": dict(enumerate(self.names)), "label2id": {name: i for i, name in enumerate(self.names)}}


def load_labelled(source: Source, demos: Collection[str]) -> Labelled:
    """The rows of `source`; `demos` are the built-in sets that suit the task.

    Raises:
        PruneError: there is no such data, or its labels are not classes.
    """
    found, notes = _splits(source, demos), []
    if "validation" not in found:
        parts = found["train"].train_test_split(HELD_OUT, seed=0)
        found["train"], found["validation"] = parts["train"], parts["test"]
        notes.append(f"the data has no validation rows, so {HELD_OUT:.0%} of the training rows became that")
    if source.rows is not None:
        limits = {name: source.rows if name == "train" else max(1, source.rows // 4) for name in found}
        found = {name: _first(rows, limits[name]) for name, rows in found.items()}
    column = source.label_column or _label_column(found["train"])
    _require_columns(found["train"], [column], "--label-column")
    names = _classes(found["train"], column)
    splits = {name: _numbered(rows, column, names, name) for name, rows in found.items()}
    if "test" in splits and splits["test"] is None:
        notes.append("the test rows have no labels, so they are left out")
    return Labelled(DatasetDict({n: rows for n, rows in splits.items() if rows is not None}), names, tuple(notes))


def as_model_counts(data: Labelled, config: Any) -> Labelled:
    """`data` with its classes in the order of a trained model's.

    Raises:
        PruneError: the model tells other classes apart.
    """
    known = dict(config.label2id)
    if config.num_labels != len(data.names) or not (set(known) == set(data.names) or "LABEL_0" in known):
        raise PruneError(
            f"the model tells {config.num_labels} classes apart ({_some(known)}) and the data has {len(data.names)} "
            f"({_some(data.names)}); use the data that it was trained for."
        )
    if "LABEL_0" in known:
        return data
    names = sorted(known, key=known.__getitem__)
    turned = [names.index(name) for name in data.names]
    splits = {
        split: _labelled(rows, "labels", [turned[label] for label in rows["labels"]], names)
        for split, rows in data.splits.items()
    }
    return Labelled(DatasetDict(splits), names, data.notes)


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:4]) + (", ..." if len(names) > 4 else "")


def input_columns(
    rows: Dataset, given: Sequence[str], known: Sequence[tuple[str, ...]], fits: Callable[[Any], bool]
) -> tuple[str, ...]:
    """The columns to feed: those given, else the first of `known` that `rows` has, else the only one that `fits`."""
    if given:
        _require_columns(rows, given, "--input-column")
        return tuple(given)
    for names in known:
        if set(names) <= set(rows.column_names):
            return names
    fitting = [name for name, feature in rows.features.items() if fits(feature)]
    if len(fitting) == 1:
        return (fitting[0],)
    raise PruneError(
        f"which column to read cannot be told from {rows.column_names}; name it with --input-column "
        "(twice for a pair of texts)."
    )


def is_text(feature: Any) -> bool:
    """Whether a column of that feature holds texts."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_image(feature: Any) -> bool:
    """Whether a column of that feature holds images."""
    return isinstance(feature, Image)


def _splits(source: Source, demos: Collection[str]) -> dict[str, Dataset]:
    if source.data.startswith(DEMO):
        return dict(_demo(source.data.removeprefix(DEMO), demos, source.rows))
    found = _loaded(source)
    splits = dict(found) if isinstance(found, DatasetDict) else {"train": found}
    for name, path in (("validation", source.eval_data), ("test", source.test_data)):
        if path is not None:
            splits[name] = _only(_from_file(path), path)
    return _named(splits, source)


def _demo(name: str, demos: Collection[str], rows: int | None) -> DatasetDict:
    if name not in demos:
        raise PruneError(f"there is no built-in data {name!r} for this task{closest(name, sorted(demos))}.")
    load: Callable[..., DatasetDict] = getattr(demo_data, f"load_{name}")
    return load(limit=rows)


def _loaded(source: Source) -> Any:
    path = Path(source.data)
    if path.is_file():
        return _from_file(source.data)
    if path.suffix in BUILDERS and not path.exists():
        raise PruneError(f"there is no file {source.data!r}.")
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()):
        return load_from_disk(source.data)
    return _checked(source.data, lambda: load_dataset(source.data, source.subset))


def _from_file(name: str) -> Any:
    path = Path(name)
    if not path.is_file():
        raise PruneError(f"there is no file {name!r}.")
    if path.suffix not in BUILDERS:
        raise PruneError(f"{name!r} must end in one of {', '.join(BUILDERS)}, or be a folder or a data set's name.")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return _checked(name, lambda: load_dataset(BUILDERS[path.suffix], data_files=name, **options))


def _checked(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (DatasetsError, OSError, ValueError, json.JSONDecodeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise PruneError(f"data {name!r} cannot be read: {reason[:300]}") from error


def _only(found: Any, path: str) -> Dataset:
    (rows,) = found.values()
    return rows


def _named(splits: dict[str, Dataset], source: Source) -> dict[str, Dataset]:
    if "train" not in splits:
        raise PruneError(f"data {source.data!r} has no split 'train', only {list(splits)}.")
    if source.eval_split is not None and source.eval_split not in splits:
        raise PruneError(f"--eval-split: data {source.data!r} has {list(splits)}, got {source.eval_split!r}.")
    chosen = source.eval_split or next((name for name in VALIDATION_SPLITS if name in splits), None)
    result = {"train": splits["train"]}
    if chosen is not None:
        result["validation"] = splits[chosen]
    if "test" in splits and chosen != "test":
        result["test"] = splits["test"]
    return result


def _first(rows: Dataset, count: int) -> Dataset:
    """`count` rows of a fixed shuffle: files are often sorted by class."""
    return rows if count >= len(rows) else rows.shuffle(seed=0).select(range(count))


def _label_column(rows: Dataset) -> str:
    for name in LABEL_COLUMNS:
        if name in rows.column_names:
            return name
    raise PruneError(
        f"the data has no column {' or '.join(LABEL_COLUMNS)}; name one with --label-column, of {rows.column_names}."
    )


def _require_columns(rows: Dataset, names: Sequence[str], option: str) -> None:
    for name in names:
        if name not in rows.column_names:
            raise PruneError(f"{option}: the data has no column {name!r}{closest(name, rows.column_names)}.")


def _classes(rows: Dataset, column: str) -> list[str]:
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = rows.unique(column)
    if any(isinstance(value, (float, list, dict)) for value in values):
        raise PruneError(f"column {column!r} holds {feature}, but labels must be classes: texts or whole numbers.")
    names = [str(value) for value in sorted(value for value in values if value is not None)]
    if len(names) < 2:
        raise PruneError(f"column {column!r} of the training rows has {len(names)} class; at least 2 are needed.")
    return names


def _numbered(rows: Dataset, column: str, names: Sequence[str], split: str) -> Dataset | None:
    """`rows` with the column `labels`; None for test rows without labels."""
    values: list[Any] = list(rows[column]) if column in rows.column_names else [None]
    if split == "test" and all(value is None or value == -1 for value in values):
        return None
    if isinstance(rows.features[column], ClassLabel):
        return rows if column == "labels" else _labelled(rows, column, values, names)
    numbers = {name: i for i, name in enumerate(names)}
    unknown = {str(value) for value in values} - set(numbers)
    if unknown:
        raise PruneError(f"column {column!r} of the {split} rows has {sorted(unknown)[:5]}, which no training row has.")
    return _labelled(rows, column, [numbers[str(value)] for value in values], names)


def _labelled(rows: Dataset, column: str, labels: list[int], names: Sequence[str]) -> Dataset:
    """`rows` with `labels` in the column of that name, and without `column`; no other column is read."""
    gone = [name for name in {column, "labels"} if name in rows.column_names]
    return rows.remove_columns(gone).add_column("labels", labels).cast_column("labels", ClassLabel(names=list(names)))
