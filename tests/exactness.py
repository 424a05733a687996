"""What the graph tests share: a plan of mixed ratios, and the comparison of masked and shrunk models."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_prune.graph import Graph, mask, shrink, trace
from hf_prune.graph.trace import Inputs, call, distinct_tensors
from hf_prune.graph.verify import random_keep, random_plan
from hf_prune.types import Group, Plan


def even_plan(groups: Iterable[Group], ratio: float) -> Plan:
    generator = torch.Generator().manual_seed(7)
    return {each.name: random_keep(each.size, max(1, round(each.size * (1 - ratio))), generator) for each in groups}


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return call(model, distinct_tensors(model), inputs)


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Largest difference, relative to the largest output where that is not zero."""
    pairs = [((a - b).abs().max(), a.abs().max()) for a, b in zip(left, right, strict=True)]
    return max(float(each / largest if largest > 0 else each) for each, largest in pairs)


def check_exact(model: nn.Module, inputs: Inputs, tolerance: float = 1e-10) -> Graph:
    """Masked and shrunk models agree for a mixed plan over every group that is not normalised; masking matters."""
    graph = trace(model, inputs)
    plan = random_plan(group for group in graph.groups.values() if not group.normalised)
    if plan:
        masked, shrunk = copy.deepcopy(model), copy.deepcopy(model)
        mask(masked, graph, plan)
        shrink(shrunk, graph, plan)
        wanted = outputs(masked, inputs)
        assert difference(outputs(model, inputs), wanted) > 1e-3, "masking changed nothing"
        assert difference(wanted, outputs(shrunk, inputs)) <= tolerance
    return graph
