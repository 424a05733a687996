"""Prices: closed forms agree with counting what the shrunk model really computes."""

from __future__ import annotations

import time

import pytest
import torch
from exactness import even_plan, outputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import build

from hf_prune.graph import shrink, trace

NAMES = ["BertForSequenceClassification", "GPT2ForSequenceClassification", "LlamaForSequenceClassification"]
NAMES += ["ResNetForImageClassification", "ConvNextForImageClassification", "SwinForImageClassification"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_price_of_a_plan(name: str, ratio: float) -> None:
    model, inputs = build(name, torch.float32)
    graph = trace(model, inputs)
    plan = even_plan(graph.groups.values(), ratio)
    price = graph.price(plan)
    shrink(model, graph, plan)
    parameters = list(model.parameters())
    assert price.parameters == sum(parameter.numel() for parameter in parameters)
    assert price.bytes == sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs(model, inputs)
    assert price.multiply_adds == counter.get_total_flops() / 2 / 2  # two operations each, two samples


def test_prices_are_differentiable_and_quick() -> None:
    graph = trace(*build("SwinForImageClassification"))
    sizes = torch.tensor([float(group.size) for group in graph.groups.values()], requires_grad=True)
    (gradient,) = torch.autograd.grad(graph.prices.at(sizes)[0], sizes)
    assert (gradient > 0).all()
    start = time.perf_counter()
    for _ in range(100):
        graph.prices.at(sizes.detach())
    assert (time.perf_counter() - start) / 100 < 1e-3
