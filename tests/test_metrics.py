"""The shipped metrics against scikit-learn and numbers worked out by hand, with the network shut."""

import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

from hf_prune import metrics
from hf_prune.metrics.span_f1 import normalise
from hf_prune.types import PruneError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


LABELS = st.integers(2, 5).flatmap(
    lambda classes: st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=40)
)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@given(pairs=LABELS)
@settings(max_examples=40, deadline=None)
def test_f1_and_accuracy_equal_scikit_learn(average, pairs):
    predictions, references = zip(*pairs, strict=True)
    ours = metrics.load("f1").compute(predictions=predictions, references=references, average=average)
    assert ours["f1"] == pytest.approx(f1_score(references, predictions, average=average, zero_division=0))
    accuracy = metrics.load("accuracy").compute(predictions=predictions, references=references)
    assert accuracy == {"accuracy": pytest.approx(accuracy_score(references, predictions))}


@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_binary_f1_equals_scikit_learn(pairs):
    predictions, references = zip(*pairs, strict=True)
    ours = metrics.load("f1").compute(predictions=predictions, references=references)
    assert ours["f1"] == pytest.approx(f1_score(references, predictions, zero_division=0))


def test_f1_by_hand():
    # class 1: 2 right, 3 predicted, 4 actual -> 2 * 2 / 7; class 0: 1 right, 3 predicted, 2 actual -> 2 * 1 / 5
    inputs = {"predictions": [1, 1, 1, 0, 0, 0], "references": [1, 1, 0, 1, 1, 0]}
    f1 = metrics.load("f1")
    assert f1.compute(**inputs)["f1"] == pytest.approx(4 / 7)
    assert f1.compute(**inputs, pos_label=0)["f1"] == pytest.approx(2 / 5)
    assert f1.compute(**inputs, average="macro")["f1"] == pytest.approx((4 / 7 + 2 / 5) / 2)
    assert f1.compute(**inputs, average="micro")["f1"] == pytest.approx(3 / 6)
    assert f1.compute(**inputs, average="weighted")["f1"] == pytest.approx((4 * 4 / 7 + 2 * 2 / 5) / 6)


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({"average": "mean"}, [0, 1], r"average must be one of .*'macro'.*, got 'mean'"),
        ({}, [0, 1, 2], r"average='binary' is for two classes, got 3: \[0, 1, 2\]; pass average='macro'"),
        ({"pos_label": 7}, [0, 1], r"pos_label must be one of the classes \[0, 1\], got 7"),
    ],
)
def test_f1_says_what_is_wrong(options, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.load("f1").compute(predictions=labels, references=labels, **options)


def test_normalise_as_squad_does():
    assert normalise("  The  cat's, hat -- AN old A one!") == "cats hat old one"


@pytest.mark.parametrize(
    ("prediction", "golds", "exact_match", "f1"),
    [
        ("The Eiffel Tower", ["Eiffel Tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * 1 / (3 + 1)),
        ("in Paris, France", ["London", "Paris France"], 0, 2 * 2 / (3 + 2)),  # the best gold answer
        ("go go go", ["go go"], 0, 2 * 2 / (3 + 2)),  # repeats count as often as both have them
        ("", [], 1, 1),  # no answer, and rightly
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", [], 1, 1),  # nothing is left after normalisation
        ("Paris", ["the", "Paris"], 1, 1),  # a gold answer of articles alone is none
        ("", ["the", "Paris"], 0, 0),
    ],
)
def test_span_f1_by_hand(prediction, golds, exact_match, f1):
    scores = metrics.load("span_f1").compute(predictions=[prediction], references=[golds])
    assert scores == {"exact_match": exact_match, "f1": pytest.approx(f1)}


def test_span_f1_is_the_mean_over_questions():
    scores = metrics.load("span_f1").compute(predictions=["red", "in Paris"], references=[["red"], ["Paris", "Rome"]])
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3) / 2)}


@pytest.mark.parametrize("keep_in_memory", [True, False])
@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_batches_add_up(name, keep_in_memory, tmp_path):
    metric = metrics.load(name, keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    metric.add(predictions=1, references=1)
    together = metrics.load(name).compute(predictions=[1, 0, 1], references=[1, 1, 1])
    assert metric.compute() == together


def test_metrics_combine():
    import evaluate

    both = evaluate.combine([metrics.load("accuracy"), metrics.load("f1")])
    assert both.compute(predictions=[1, 0, 1, 1], references=[1, 1, 1, 0]) == {
        "accuracy": 0.5,
        "f1": pytest.approx(2 * 2 / 6),
    }


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_says_what_it_is(name):
    metric = metrics.load(name)
    assert metric.name == name
    assert metric.description
    assert metric.inputs_description


def test_an_unknown_metric_gives_one_sentence():
    message = (
        r"^metric 'no_such_metric' is none of \['accuracy', 'f1', 'span_f1'\].*check the name and the connection\.$"
    )
    with pytest.raises(PruneError, match=message):
        metrics.load("no_such_metric")


LOGITS = np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.0, 0.2, 0.8], [0.3, 0.4, 0.3]])


@pytest.mark.parametrize(
    "predictions", [LOGITS, (LOGITS, np.zeros((4, 7))), LOGITS.argmax(-1)], ids=["logits", "tuple", "classes"]
)
def test_compute_metrics_for_trainer(predictions):
    labels = np.array([1, 0, 1, 1])
    evaluation = EvalPrediction(predictions=predictions, label_ids=labels)
    assert metrics.compute_metrics_for("accuracy")(evaluation) == {"accuracy": 0.75}
    expected = f1_score(labels, LOGITS.argmax(-1), average="macro")
    assert metrics.compute_metrics_for("f1", average="macro")(evaluation) == {"f1": pytest.approx(expected)}


def test_trainer_takes_compute_metrics(tmp_path):
    config = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    rows = [{"input_ids": [i, i + 1, i + 2], "labels": i % 3} for i in range(9)]
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=4),
        eval_dataset=rows,
        compute_metrics=metrics.compute_metrics_for("f1", average="macro"),
    )
    predicted = trainer.predict(rows)
    expected = f1_score(predicted.label_ids, predicted.predictions.argmax(-1), average="macro")
    assert trainer.evaluate()["eval_f1"] == pytest.approx(expected)


def test_compute_metrics_leaves_out_ignored_tokens():
    evaluation = EvalPrediction(predictions=LOGITS.reshape(2, 2, 3), label_ids=np.array([[1, -100], [0, 1]]))
    assert metrics.compute_metrics_for("accuracy")(evaluation) == {"accuracy": pytest.approx(2 / 3)}


def test_compute_metrics_refuses_a_metric_of_texts():
    with pytest.raises(PruneError, match=r"needs a metric of class labels, 'span_f1' takes .*string"):
        metrics.compute_metrics_for("span_f1")


def test_importing_the_package_leaves_evaluate_alone():
    check = "import sys, hf_prune, hf_prune.metrics; sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
