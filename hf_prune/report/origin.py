"""Where a model comes from: the base model, the data and the training run, as far as they can be told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import Trainer

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILE = re.compile(r"hf://datasets/([^/@]+(?:/[^/@]+)?)@")
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "model_preparation_time")


def base_model(model: nn.Module) -> str | None:
    """The Hub id that `model` was loaded from; None for a folder and for a model made from a config."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """`name`, `id` on the Hub, `config`, `split` and `rows` of a dataset; None for what it does not know."""
    info = getattr(dataset, "info", None)
    ids = {found[1] for url in getattr(info, "download_checksums", None) or () if (found := _HUB_FILE.match(url))}
    split = getattr(dataset, "split", None)
    return {
        "name": getattr(info, "dataset_name", None),
        "id": ids.pop() if len(ids) == 1 else None,
        "config": getattr(info, "config_name", None),
        "split": None if split is None else str(split),
        "rows": len(dataset) if hasattr(dataset, "__len__") else None,
    }


def scores(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of an evaluation that say how good the model is, not how long it took."""
    times = {f"{prefix}_{name}" for name in _TIMES}
    named = {name: value for name, value in metrics.items() if name.startswith(f"{prefix}_") and name not in times}
    return {name: float(value) for name, value in named.items() if isinstance(value, (int, float))}


def describe_training(trainer: Trainer, distillation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Hyperparameters, steps, epochs and seconds of a finished run, and how it was distilled; plain JSON types."""
    from transformers.modelcard import extract_hyperparameters_from_trainer
    from transformers.training_args import OptimizerNames

    ended = next((entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), {})
    optimizer = {"optimizer": OptimizerNames(trainer.args.optim).value}  # transformers has a whole sentence here
    facts = {
        "hyperparameters": extract_hyperparameters_from_trainer(trainer) | optimizer,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": ended.get("train_runtime"),
        "loss": ended.get("train_loss"),
        "distillation": distillation,
    }
    return json.loads(json.dumps(facts, default=str))
