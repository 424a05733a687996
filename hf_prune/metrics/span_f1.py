"""Exact match and F1 of answer spans as SQuAD 1.1 and 2.0 score them (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import List as ListOf

CITATION = """@inproceedings{rajpurkar2018know,
  title = {Know What You Don't Know: Unanswerable Questions for {SQuAD}},
  author = {Rajpurkar, Pranav and Jia, Robin and Liang, Percy},
  booktitle = {Proceedings of ACL},
  year = {2018}
}"""
PUNCTUATION = str.maketrans("", "", string.punctuation)


class SpanF1(evaluate.Metric):
    """`compute(predictions, references) -> {"exact_match": ..., "f1": ...}`, each a mean in [0, 1], not percent.

    predictions: one text per question, empty for "no answer". references: the gold answers of each question, a list of
    texts; an empty list where the question has none. The best gold answer counts.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match and token F1 of answer texts, after SQuAD's normalisation.",
            citation=CITATION,
            inputs_description="predictions: texts. references: a list of gold texts each, empty for no answer.",
            features=Features({"predictions": Value("string"), "references": ListOf(Value("string"))}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        questions = list(zip(predictions, references, strict=True))
        return {
            "exact_match": float(np.mean([_best(exact_match, text, golds) for text, golds in questions])),
            "f1": float(np.mean([_best(token_f1, text, golds) for text, golds in questions])),
        }


def normalise(text: str) -> str:
    """`text` in lower case, without ASCII punctuation and English articles, with single spaces."""
    bare = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(text: str, gold: str) -> float:
    """1 where both are the same after `normalise`, else 0."""
    return float(normalise(text) == normalise(gold))


def token_f1(text: str, gold: str) -> float:
    """F1 of the words of both, counted with repeats; where either has none, 1 if both have none and 0 otherwise."""
    words, gold_words = normalise(text).split(), normalise(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words))


def _best(score: Callable[[str, str], float], text: str, golds: list[str]) -> float:
    # A gold answer of articles and punctuation alone is none; a question with no gold answer wants an empty text.
    answers = [gold for gold in golds if normalise(gold)] or [""]
    return max(score(text, gold) for gold in answers)
