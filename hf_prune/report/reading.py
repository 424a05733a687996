"""`pruning.json` back into a `Report`, and a run's log: data from strangers, so names and types are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hf_prune.graph.table import require_known
from hf_prune.types import PRUNING_FILE, CheckpointError, Paper, PruneError, Report

STATE_FILE = "trainer_state.json"

_PRICES = ("multiply_adds", "parameters", "bytes")
_KINDS: dict[Any, tuple[type, ...]] = {dict: (dict,), str: (str,), float: (float, int)}
_TIMES = ("median_ms", "low_ms", "high_ms")


def read_report(folder: str | Path) -> Report:
    """The report that `hf_prune.save_pretrained` wrote to `folder`.

    Raises:
        PruneError: there is none.
        CheckpointError: it is not what we write.
    """
    path = Path(folder) / PRUNING_FILE
    if not path.is_file():
        raise PruneError(
            f"{str(folder)!r} has no {PRUNING_FILE}, which says what was pruned; "
            "write it with hf_prune.save_pretrained(model, folder, report=report)."
        )
    return parse_report(read_json(path))


def read_json(path: Path) -> Any:
    """What a file holds. Raises `CheckpointError` where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); save the model again.") from error


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The log of the run's last trainer state, one entry a log; empty where nothing was trained.

    Raises:
        CheckpointError: the state is damaged.
    """
    folder = Path(folder)
    states = [folder / STATE_FILE, *sorted(folder.glob(f"checkpoint-*/{STATE_FILE}"), key=_last_first)]
    path = next((each for each in states if each.is_file()), None)
    if path is None:
        return []
    state = read_json(path)
    history = state.get("log_history", []) if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{path} has no log_history, a list of objects.")
    return history


def _last_first(path: Path) -> int:
    return -int(path.parent.name.rpartition("-")[2])


def parse_report(raw: Any) -> Report:
    """The inverse of `Report.to_dict`. Raises `CheckpointError` for anything that it would not give."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{PRUNING_FILE} must be an object, got {type(raw).__name__}.")
    known, hints = {each.name: each for each in fields(Report)}, get_type_hints(Report)
    require_known(raw, known, f"key in {PRUNING_FILE}")
    for name, each in known.items():
        if name in raw:
            _require_type(name, raw[name], hints[name])
        elif each.default is MISSING and each.default_factory is MISSING:
            raise CheckpointError(f"{PRUNING_FILE} lacks {name!r}.")
    report = Report(**raw)
    _require_parts(report)
    return report


def _require_parts(report: Report) -> None:
    """What the values of the fields hold, as far as cards and tables use it."""
    try:
        Paper(**report.paper)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{PRUNING_FILE}: paper is no Paper of ours: {error}.") from error
    _require_numbers("parameters", report.parameters, ("dense", "prunable", "kept"))
    _require_numbers("metrics", report.metrics)
    require_known(report.prices, _PRICES, f"key in {PRUNING_FILE}, prices:")
    for kind, price in report.prices.items():
        _require_numbers(f"prices.{kind}", price, ("dense", "kept"))
    for kind in ("dense", "kept") if report.latency else ():
        _require_numbers(f"latency.{kind}", report.latency.get(kind), _TIMES)
    for field in ("layers", "datasets"):
        for name, entry in getattr(report, field).items():
            if not isinstance(entry, dict):
                raise CheckpointError(f"{PRUNING_FILE}: {field}.{name} must be an object, got {entry!r}.")


def _require_type(name: str, value: Any, hint: Any) -> None:
    kinds: tuple[type, ...] = _KINDS.get(get_origin(hint) or hint, (str, type(None)))
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise CheckpointError(f"{PRUNING_FILE}: {name} must be {kinds[0].__name__}, got {value!r}.")


def _require_numbers(name: str, values: Any, keys: tuple[str, ...] = ()) -> None:
    if not isinstance(values, dict) or any(key not in values for key in keys):
        raise CheckpointError(f"{PRUNING_FILE}: {name} must have {', '.join(keys) or 'names'}, got {values!r}.")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{PRUNING_FILE}: {name}.{key} must be a number, got {value!r}.")
