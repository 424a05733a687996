"""Every model of the zoo: traced, pruned at 30 % and 50 %, run again, and exact where no statistics are involved."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import check_exact, even_plan, outputs
from zoo import ZOO, build

from hf_prune.graph import shrink, trace

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

LITTLE = {
    "FNetForSequenceClassification": "its stream goes through a Fourier transform",
    "LongformerForSequenceClassification": "windows of its attention are overlapping views of all of its stream",
    "NystromformerForSequenceClassification": "all heads share the largest entry of one matrix",
    "Siglip2ForImageClassification": "code fills a new tensor of its stream's width row by row",
    "T5EncoderModel": "its stream is its output",
    "Wav2Vec2ForSequenceClassification": "its stream passes a convolution with weight norm",
}
"""Models that keep more than 60 % of their parameters at 30 % of every group, and why."""


def entries() -> list:
    return [pytest.param(name, marks=pytest.mark.slow if entry.slow else ()) for name, entry in ZOO.items()]


@pytest.mark.parametrize("name", entries())
def test_masked_equals_shrunk(name: str) -> None:
    model, inputs = build(name)
    graph = check_exact(model, inputs, TOLERANCE[ZOO[name].exact_dtype])
    assert not [group.frozen for group in graph.frozen.values() if "disagrees" in group.frozen]


@pytest.mark.parametrize("name", entries())
def test_pruned_models_run_and_are_small(name: str) -> None:
    model, inputs = build(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    graph, kept = trace(model, inputs), []
    for ratio in (0.3, 0.5):
        pruned, plan = copy.deepcopy(model), even_plan(graph.groups.values(), ratio)
        shrink(pruned, graph, plan)
        after = sum(parameter.numel() for parameter in pruned.parameters())
        assert after == graph.price(plan).parameters
        shapes = [tuple(output.shape) for output in outputs(pruned, inputs)]
        assert shapes == [tuple(output.shape) for output in outputs(model, inputs)]
        kept.append(after / before)
    assert (kept[0] < 0.6) != (name in LITTLE), f"{kept[0]:.3f} of the parameters kept at 30 %"
    assert kept[1] < kept[0]


@pytest.mark.parametrize("name", entries())
def test_a_pruned_model_can_be_traced_and_pruned_again(name: str) -> None:
    model, inputs = build(name)
    first = trace(model, inputs)
    plan = even_plan(first.groups.values(), 0.3)
    shrink(model, first, plan)
    second = trace(model, inputs)
    kept = [int(keep.sum()) for keep in plan.values()]
    assert sorted(group.size for group in second.groups.values()) == sorted(count for count in kept if count > 1)
    shrink(model, second, even_plan(second.groups.values(), 0.3))
    outputs(model, inputs)
