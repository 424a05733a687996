"""Accuracy: the share of predictions that equal their reference."""

from __future__ import annotations

import evaluate
import numpy as np
from datasets import Features, Value


class Accuracy(evaluate.Metric):
    """`compute(predictions, references) -> {"accuracy": share in [0, 1]}`, both integer classes of shape (N,)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: class numbers, one per example.",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
