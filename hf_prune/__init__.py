"""hf_prune: prune Hugging Face models during or after fine-tuning, and save what is left as ordinary checkpoints."""

from __future__ import annotations

import importlib
from typing import Any

from hf_prune.checkpoint.registration import register_loader

__version__ = "0.1.0"

_EXPORTS = {
    "Pruner": "hf_prune.pruner",
    "PruneTrainer": "hf_prune.trainer",
    "PruneOptimizer": "hf_prune.optimizer",
    "PruneConfig": "hf_prune.config",
    "DistillConfig": "hf_prune.parts.distillation",
    "Report": "hf_prune.types",
    "PruneError": "hf_prune.types",
    "CheckpointError": "hf_prune.types",
    "prune": "hf_prune.api",
    "save_pretrained": "hf_prune.checkpoint",
    "push_to_hub": "hf_prune.checkpoint",
}
"""Public name -> module, imported on first use so that `import hf_prune` stays quick."""


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name.endswith("Config"):
        from hf_prune.methods import config_class

        found = config_class(name)
        if found is not None:
            return found
    raise AttributeError(f"module 'hf_prune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


register_loader()
