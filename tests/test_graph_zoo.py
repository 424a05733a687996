"""Every model of the zoo: traced, pruned at 30 % and 50 %, run, loaded, pruned again; exact but for statistics."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from exactness import check_exact, even_plan, outputs
from zoo import ZOO, build

from hf_prune.checkpoint import mark, save_pretrained
from hf_prune.graph import shrink, trace
from hf_prune.testing import aligned

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

LITTLE = {
    "DINOv3ViTModel": "its stream is its output",
    "FNetForSequenceClassification": "its stream goes through a Fourier transform",
    "Qwen3MoeForCausalLM": "its experts are one grouped operation, which needs aligned widths",
    "SEWForSequenceClassification": "its stream passes a convolution with weight norm",
    "LongformerForSequenceClassification": "windows of its attention are overlapping views of all of its stream",
    "MarianMTModel": "code makes the position tables that are added to its streams when a checkpoint is loaded",
    "NystromformerForSequenceClassification": "all heads share the largest entry of one matrix",
    "Siglip2ForImageClassification": "code fills a new tensor of its stream's width row by row",
    "T5EncoderModel": "its stream is its output",
    "Wav2Vec2ForSequenceClassification": "its stream passes a convolution with weight norm",
    "XLNetForSequenceClassification": "a part of its weights is only used with segments",
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
    wanted = [tuple(output.shape) for output in outputs(model, inputs)]  # some models change when they first run
    graph, kept = trace(model, inputs), []
    for ratio in (0.3, 0.5):
        pruned, plan = copy.deepcopy(model), even_plan(graph.groups.values(), ratio)
        shrink(pruned, graph, plan)
        after = sum(parameter.numel() for parameter in pruned.parameters())
        assert after == graph.price(plan).parameters
        shapes = [tuple(output.shape) for output in outputs(pruned, inputs)]
        assert shapes == wanted
        kept.append(after / before)
    assert (kept[0] < 0.6) != (name in LITTLE), f"{kept[0]:.3f} of the parameters kept at 30 %"
    assert kept[1] < kept[0] or name in LITTLE


@pytest.mark.parametrize("name", entries())
def test_a_pruned_model_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, inputs = build(name, torch.float32)
    graph = trace(model, inputs)
    mark(model, shrink(model, graph, even_plan(graph.groups.values(), 0.3)))
    wanted = outputs(model, inputs)
    save_pretrained(model, tmp_path)
    found = outputs(aligned(type(model).from_pretrained(tmp_path).eval()), inputs)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


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
