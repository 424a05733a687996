"""F1: the harmonic mean of precision and recall of each class, averaged over classes as asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import evaluate
import numpy as np
from datasets import Features, Value


@dataclass(frozen=True)
class Counts:
    """Per class, arrays of shape (classes,): its number, how often it was right, predicted, and the reference."""

    label: np.ndarray
    right: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray


class F1(evaluate.Metric):
    """`compute(predictions, references, average="binary", pos_label=1) -> {"f1": score in [0, 1]}`.

    predictions, references: integer classes of shape (N,). average: "binary" (F1 of `pos_label` alone), "macro" (mean
    over classes), "micro" (of the counts summed over classes), "weighted" (mean over classes by their frequency among
    the references). Classes are those that occur in either, as in scikit-learn.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Harmonic mean of precision and recall.",
            citation="",
            inputs_description="predictions, references: class numbers. average: binary, macro, micro, weighted.",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(
        self, predictions: np.ndarray, references: np.ndarray, average: str = "binary", pos_label: int = 1
    ) -> dict[str, float]:
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {sorted(AVERAGES)}, got {average!r}.")
        counts = count(np.asarray(predictions), np.asarray(references))
        return {"f1": float(AVERAGES[average](counts, pos_label))}


def count(predictions: np.ndarray, references: np.ndarray) -> Counts:
    """Counts over the classes that occur in `predictions` or `references`, both of shape (N,)."""
    label, positions = np.unique(np.concatenate([predictions, references]), return_inverse=True)
    predicted, actual = np.split(positions, 2)
    per_class = (
        np.bincount(part, minlength=len(label)) for part in (predicted[predicted == actual], predicted, actual)
    )
    return Counts(label, *per_class)


def _per_class(counts: Counts) -> np.ndarray:
    # 2 P R / (P + R) with P = right / predicted and R = right / actual; each class occurs, so nothing is divided by 0.
    return 2 * counts.right / (counts.predicted + counts.actual)


def _binary(counts: Counts, pos_label: int) -> np.floating | float:
    if len(counts.label) > 2:
        raise ValueError(
            f"average='binary' is for two classes, got {len(counts.label)}: {counts.label.tolist()[:10]}; "
            f"pass average='macro', 'micro' or 'weighted'."
        )
    if pos_label in counts.label:
        return _per_class(counts)[counts.label == pos_label][0]
    if len(counts.label) == 2:
        raise ValueError(f"pos_label must be one of the classes {counts.label.tolist()}, got {pos_label}.")
    return 0.0  # only the negative class occurs


AVERAGES: dict[str, Callable[[Counts, int], np.floating | float]] = {
    "binary": _binary,
    "macro": lambda counts, _: _per_class(counts).mean(),
    "micro": lambda counts, _: counts.right.sum() / counts.actual.sum(),  # every miss is one false of each kind
    "weighted": lambda counts, _: np.average(_per_class(counts), weights=counts.actual),
}
