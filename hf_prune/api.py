"""One call for methods that need no training loop of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_prune import methods
from hf_prune.config import PruneConfig
from hf_prune.parts.gates import restored_on_error
from hf_prune.parts.statistics import Data
from hf_prune.pruner import Pruner
from hf_prune.types import PruneError, Report


def prune(
    model: nn.Module,
    config: PruneConfig,
    example_inputs: Mapping[str, Tensor] | None = None,
    data: Data | None = None,
    **training: Any,
) -> tuple[nn.Module, Report]:
    """Prune `model` in place, at once; returns it with the report of what was done.

    example_inputs: inputs by name for one forward pass, for methods that look at the graph.
    data: batches as the model takes them, with labels (a list, a DataLoader, or a function that opens one), for methods
    that measure their scores; under training those are measured on the training rows.
    training: `args=TrainingArguments(...)`, `train_dataset=...` and whatever else `PruneTrainer` takes, for methods
    that prune while they train.

    Raises:
        PruneError: the method needs training and none was given, or the goal cannot be reached; the model is left as it
            was.
    """
    if training:
        if data is not None:
            raise PruneError("under training the scores are measured on train_dataset; leave data= out.")
        from hf_prune.trainer import PruneTrainer

        trainer = PruneTrainer(model=model, pruning=config, **training)
        trainer.train()
        assert trainer.report is not None
        return model, trainer.report
    if methods.load(config.method).NEEDS_TRAINING:
        raise PruneError(
            f"method {config.method!r} prunes while it trains: use hf_prune.PruneTrainer, or pass "
            "args=TrainingArguments(...) and train_dataset=... here."
        )
    pruner = Pruner(model, config, example_inputs, data=data)
    with restored_on_error(model):  # a goal may turn out to be out of reach
        pruner.attach()
        pruner.step(1, 1)
    return model, pruner.finalize()
