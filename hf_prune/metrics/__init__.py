"""Metrics of the `evaluate` library that need no hub: `load("accuracy")`, `load("f1")`, `load("span_f1")`.

A further metric is one file here with an `evaluate.Metric` in it, and one line in `METRICS`. Any other name goes to
`evaluate.load`, which needs the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_prune.types import PruneError

if TYPE_CHECKING:
    from evaluate import EvaluationModule
    from transformers import EvalPrediction

# name -> module and class; imported on use, since `evaluate` takes seconds to import
METRICS = {
    "accuracy": ("hf_prune.metrics.accuracy", "Accuracy"),
    "f1": ("hf_prune.metrics.f1", "F1"),
    "span_f1": ("hf_prune.metrics.span_f1", "SpanF1"),
}
IGNORED_LABEL = -100  # as torch's cross entropy and the data collators of transformers have it


def load(name: str, **settings: Any) -> EvaluationModule:
    """The metric of that name: one of `METRICS`, or what `evaluate.load` finds.

    settings: what `evaluate.load` takes (`config_name`, `num_process`, ...). With one process our metrics keep their
    inputs in memory, unless `keep_in_memory=False` is given: ranks that each compute a metric then share no files.
    """
    if name in METRICS:
        module, metric = METRICS[name]
        settings.setdefault("keep_in_memory", settings.get("num_process", 1) == 1)
        return getattr(import_module(module), metric)(**settings)
    return _load_from_hub(name, settings)


def compute_metrics_for(name: str, **options: Any) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `Trainer` on a classification task, of sequences, images or tokens.

    name: as `load` takes it. options: passed on to the metric's `compute`, such as `average="macro"` for f1.
    Predictions are logits of shape (..., classes), alone or first in a tuple, or the class numbers themselves; labels
    of -100 are left out.
    """
    metric = load(name)
    if not _compares_labels(metric):
        raise PruneError(
            f"compute_metrics_for needs a metric of class labels, {name!r} takes {metric.features}; turn the logits "
            f"into such predictions in a compute_metrics of your own and call hf_prune.metrics.load({name!r}).compute."
        )

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        predictions, labels = (_first(part) for part in (evaluation.predictions, evaluation.label_ids))
        if predictions.ndim > labels.ndim:
            predictions = predictions.argmax(-1)
        counted = labels != IGNORED_LABEL
        return metric.compute(predictions=predictions[counted], references=labels[counted], **options)

    return compute_metrics


def _load_from_hub(name: str, settings: dict[str, Any]) -> EvaluationModule:
    import evaluate

    try:
        return evaluate.load(name, **settings)
    except OSError as error:  # FileNotFoundError and ConnectionError, with and without HF_HUB_OFFLINE
        raise PruneError(
            f"metric {name!r} is none of {sorted(METRICS)}, which need no download, and evaluate.load could not get it "
            f"from the Hugging Face Hub: check the name and the connection."
        ) from error


def _compares_labels(metric: EvaluationModule) -> bool:
    references = metric.features["references"] if isinstance(metric.features, dict) else None
    return getattr(references, "dtype", "").startswith("int")


def _first(part: Any) -> Any:
    return part[0] if isinstance(part, tuple) else part
