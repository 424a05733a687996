"""The methods: one file a paper, found through this table. Adding one is a new file and a new line here."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from hf_prune.config import PruneConfig, closest
from hf_prune.types import PruneError

METHODS = {
    "annealing": "hf_prune.methods.annealing",
    "bwcp": "hf_prune.methods.bwcp",
    "c2s2": "hf_prune.methods.c2s2",
    "channel_similarity": "hf_prune.methods.channel_similarity",
    "dmcp": "hf_prune.methods.dmcp",
    "ezcrop": "hf_prune.methods.ezcrop",
    "feature_relevance": "hf_prune.methods.feature_relevance",
    "gate_decorator": "hf_prune.methods.gate_decorator",
    "growing_regularization": "hf_prune.methods.growing_regularization",
    "lookahead": "hf_prune.methods.lookahead",
    "magnitude": "hf_prune.methods.magnitude",
    "movement": "hf_prune.methods.movement",
    "play_and_prune": "hf_prune.methods.play_and_prune",
    "prune_while_training": "hf_prune.methods.prune_while_training",
    "prunenet": "hf_prune.methods.prunenet",
    "resrep": "hf_prune.methods.resrep",
    "snapshot_ensemble": "hf_prune.methods.snapshot_ensemble",
    "weight_importance": "hf_prune.methods.weight_importance",
}
"""Name -> module with `Config`, `PAPER`, `build`, `NEEDS_TRAINING`, `GOALS` and `TINY`; imported on use."""


def load(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        PruneError: no such method; the closest one is named.
    """
    if name not in METHODS:
        raise PruneError(f"there is no method {name!r}{closest(name, list(METHODS))}.")
    return importlib.import_module(METHODS[name])


def config_class(name: str) -> type[PruneConfig] | None:
    """The config class of that name (`MovementConfig`), or None; only the module that has it is imported."""
    key = name.removesuffix("Config").lower()
    for method in METHODS:
        if name.endswith("Config") and method.replace("_", "") == key:
            return load(method).Config
    return None


def config_from_dict(values: dict[str, Any]) -> PruneConfig:
    """The config that `PruneConfig.to_dict` wrote, of whichever method."""
    if "method" not in values:
        raise PruneError(f"a pruning config needs the key 'method', one of {', '.join(METHODS)}; got {list(values)}.")
    return load(values["method"]).Config.from_dict(values)
