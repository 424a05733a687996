"""Exactness beyond one plan a model: random masks, dead groups, single precision, and streams under statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import difference, even_plan, outputs
from test_graph_zoo import TOLERANCE, entries
from torch import Tensor, nn
from zoo import ZOO, build

from hf_prune.graph import Graph, mask, shrink, trace
from hf_prune.graph.sizes import sync_attributes
from hf_prune.graph.verify import random_keep, random_plan
from hf_prune.types import Plan

MASKS = 10
"""A model; over the zoo these are more than a thousand."""

FAST = [name for name, entry in ZOO.items() if not entry.slow]


def plan_of_many_kinds(graph: Graph, seed: int) -> tuple[Plan, Plan]:
    """A plan for some of the groups that are exact, and which of these are dead: not one of their units works.

    A dead group keeps one unit, which is zero too: heads without one, neurons without one, layers that add nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    plan, dead = {}, {}
    for group in graph.groups.values():
        draw, share = torch.rand(2, generator=generator).tolist()
        if group.normalised or draw < 0.3:
            continue
        silenced = draw > 0.8
        count = 1 if silenced else max(1, round(group.size * share))
        plan[group.name] = random_keep(group.size, count, generator)
        if silenced:
            dead[group.name] = torch.zeros(group.size, dtype=torch.bool)
    return plan, dead


@pytest.mark.parametrize("name", entries())
def test_random_masks(name: str) -> None:
    assert len(ZOO) * MASKS >= 1000
    model, inputs = build(name)
    before = outputs(model, inputs)  # first: some models settle when they run for the first time
    graph, changed = trace(model, inputs), 0
    for seed in range(MASKS if ZOO[name].slow else 1):
        plan, dead = plan_of_many_kinds(graph, seed)
        masked = copy.deepcopy(model)
        mask(masked, graph, dead)
        mask(masked, graph, plan)
        # Units behind a dead group emit constants; what is masked before it is cut adds them nowhere.
        shrunk = copy.deepcopy(masked)
        shrink(shrunk, graph, plan)
        wanted = outputs(masked, inputs)
        assert difference(wanted, outputs(shrunk, inputs)) <= TOLERANCE[ZOO[name].exact_dtype]
        changed += difference(before, wanted) > 1e-3 if plan else 0
    assert changed or not any(not group.normalised for group in graph.groups.values())


@pytest.mark.parametrize("name", FAST)
def test_single_precision(name: str) -> None:
    model, inputs = build(name, torch.float32)
    graph = trace(model, inputs)
    plan = random_plan(group for group in graph.groups.values() if not group.normalised)
    masked, shrunk = copy.deepcopy(model), copy.deepcopy(model)
    mask(masked, graph, plan)
    shrink(shrunk, graph, plan)
    assert difference(outputs(masked, inputs), outputs(shrunk, inputs)) <= 1e-5


class KeptNorm(nn.Module):
    """A norm that takes its statistics over the kept units alone, and gives zero for the others."""

    def __init__(self, norm: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.norm, self.keep = copy.deepcopy(norm), keep
        for parameter in self.norm.parameters():
            parameter.data = parameter.data[keep]
        sync_attributes(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        result[..., self.keep] = self.norm(x[..., self.keep])
        return result


STREAMS = {
    "BertForSequenceClassification": "bert.stream",
    "DistilBertForSequenceClassification": "distilbert.stream",
    "GPT2ForSequenceClassification": "transformer.stream",
    "LlamaForSequenceClassification": "model.stream",
    "ViTForImageClassification": "vit.stream",
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_against_norms_over_the_kept_units(name: str) -> None:
    model, inputs = build(name)
    graph = trace(model, inputs)
    group = graph.groups[STREAMS[name]]
    plan = even_plan([group], 0.4)
    masked, shrunk = copy.deepcopy(model), copy.deepcopy(model)
    mask(masked, graph, plan)
    paths = {member.tensor.rpartition(".")[0] for member in group.members}
    norms = [path for path in paths if "Norm" in type(masked.get_submodule(path)).__name__]
    for path in norms:
        masked.set_submodule(path, KeptNorm(masked.get_submodule(path), plan[group.name]))
    shrink(shrunk, graph, plan)
    wanted = outputs(masked, inputs)
    assert norms and difference(outputs(model, inputs), wanted) > 1e-3
    assert difference(wanted, outputs(shrunk, inputs)) <= 1e-10
