"""Compact models on disk: tables of narrow shapes, encodings of zeros, saving, loading and pushing."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazy, since registering the loader imports this package in the middle of transformers' own import.
    if name in ("mark", "save_pretrained"):
        from hf_prune.checkpoint import save

        return getattr(save, name)
    if name in ("push_folder", "push_to_hub"):
        from hf_prune.checkpoint import hub

        return getattr(hub, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
