"""Where what took long to measure is kept between commands."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """$HF_PRUNE_CACHE, else `hf_prune` beside what the Hub's client keeps ($HF_HOME)."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_PRUNE_CACHE") or Path(HF_HOME) / "hf_prune")


def cache_file(kind: str, *about: Any) -> Path:
    """The file of one measurement of that kind; `about` is what its result depends on, in JSON types."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return cache_dir() / kind / f"{digest[:32]}.json"


def read_cache(path: Path) -> dict[str, Any]:
    """What `write_cache` left there; empty where there is nothing readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(path: Path, values: dict[str, Any]) -> None:
    """Keep `values`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(values), encoding="utf-8")
    fresh.replace(path)
