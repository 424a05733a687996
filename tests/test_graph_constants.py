"""Units that emit a constant: dead ones are found, and removing them changes nothing."""

from __future__ import annotations

import pytest
import torch
from exactness import difference, outputs
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import build, sharpen

from hf_prune.graph import dead_units, shrink, trace


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(self.b(F.gelu(self.a(x)) * 2)))


class Convolutions(nn.Module):
    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 6, kernel, padding=kernel // 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(self.b(F.relu(self.n(self.a(x))))).mean((2, 3)))


class Normed(nn.Module):
    """A norm takes what its bias-free layer cannot. On the way, constants pass a max pool and join a larger dim."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b = nn.Linear(8 * 9, 6, bias=False) if flat else nn.Conv2d(8, 6, 1, bias=False)
        self.m, self.c = nn.BatchNorm1d(6) if flat else nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.sigmoid(self.n(self.a(x))), 2, padding=1)[..., :3, :3]
        x = F.relu(self.m(self.b(x.flatten(1) if self.flat else x)))
        return self.c(x if self.flat else x.mean((2, 3)))


class Joined(nn.Module):
    """Constants side by side in one tensor, read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(5, 7), nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([torch.tanh(self.a(x)), torch.sigmoid(self.b(x))], -1))


def silence(layer: nn.Module, *rows: int) -> None:
    with torch.no_grad():
        layer.weight[list(rows)] = 0


def prepared(model: nn.Module, *shape: int) -> tuple[nn.Module, dict[str, Tensor]]:
    model = model.double().eval()
    sharpen(model, factor=2.0)
    return model, {"x": torch.randn(*shape, dtype=torch.float64)}


def removed(plan: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: (~keep).nonzero().flatten().tolist() for name, keep in plan.items()}


def test_linear_layers() -> None:
    model, inputs = prepared(Perceptron(), 3, 5)
    silence(model.a, 0, 3)
    silence(model.b, 2)
    with torch.no_grad():
        model.b.weight[:, 6] = 0  # nobody reads unit 6 of a
    graph, before = trace(model, inputs), outputs(model, inputs)
    plan = dead_units(model, graph)
    assert removed(plan) == {"a": [0, 3, 6], "b": [2]}
    shrink(model, graph, plan)
    assert difference(before, outputs(model, inputs)) < 1e-12


def test_convolutions_and_norms() -> None:
    model, inputs = prepared(Convolutions(), 2, 3, 8, 8)
    silence(model.a, 1, 2)
    silence(model.b, 0)
    graph, before = trace(model, inputs), outputs(model, inputs)
    plan = dead_units(model, graph)
    assert removed(plan) == {"a": [1, 2], "b": [0]}
    shrink(model, graph, plan)
    assert difference(before, outputs(model, inputs)) < 1e-12


@pytest.mark.parametrize("flat", [False, True])
def test_a_norm_behind_the_reader_takes_constants(flat: bool) -> None:
    model, inputs = prepared(Normed(flat), 2, 3, 8, 8)
    silence(model.a, 1, 2)
    graph, before = trace(model, inputs), outputs(model, inputs)
    plan = dead_units(model, graph)
    assert removed(plan) == {"a": [1, 2]}
    shrink(model, graph, plan)
    assert difference(before, outputs(model, inputs)) < 1e-12


def test_concatenations() -> None:
    model, inputs = prepared(Joined(), 3, 5)
    silence(model.a, 5)
    silence(model.b, 0, 6)
    graph, before = trace(model, inputs), outputs(model, inputs)
    plan = dead_units(model, graph)
    assert removed(plan) == {"a": [5], "b": [0, 6]}
    shrink(model, graph, plan)
    assert difference(before, outputs(model, inputs)) < 1e-12


def test_a_padded_reader_cannot_take_a_constant() -> None:
    model, inputs = prepared(Convolutions(kernel=3), 2, 3, 8, 8)
    with torch.no_grad():
        model.n.bias[1], model.n.running_mean[1], model.a.bias[1] = 1.0, 0.0, 0.0
    silence(model.a, 1)
    graph = trace(model, inputs)
    assert "a" not in dead_units(model, graph)
    keep = torch.ones(8, dtype=torch.bool)
    keep[1] = False
    with pytest.warns(UserWarning, match=r"b\.weight"):
        shrink(model, graph, {"a": keep})


def test_a_whole_group_keeps_one_unit() -> None:
    model, inputs = prepared(Perceptron(), 3, 5)
    silence(model.a, *range(12))
    assert removed(dead_units(model, trace(model, inputs))) == {"a": list(range(1, 12))}


class Overwritten(Perceptron):
    """The first sample is written later."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        hidden[:1] = x.mean()
        return self.c(torch.sigmoid(self.b(hidden)))


class Summed(Perceptron):
    """The units are also summed without a weight."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.a(x))
        return self.c(torch.sigmoid(self.b(hidden))) + hidden.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", [Overwritten, Summed])
def test_units_with_other_uses_are_not_dead(kind: type[nn.Module]) -> None:
    model, inputs = prepared(kind(), 3, 5)
    silence(model.a, 0)
    graph = trace(model, inputs)
    assert "a" in graph.groups
    assert "a" not in dead_units(model, graph)


NEURONS = {
    "BertForSequenceClassification": "bert.encoder.layer.0.intermediate.dense",
    "GPT2ForSequenceClassification": "transformer.h.0.mlp.c_fc",
}


@pytest.mark.parametrize("name", NEURONS)
def test_transformers(name: str) -> None:
    """Zero rows of an FFN, and a head that nobody reads."""
    model, inputs = build(name)
    graph = trace(model, inputs)
    neurons = graph.groups[NEURONS[name]]
    heads = next(group for group in graph.groups.values() if group.role == "heads")
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for member in neurons.members:
            if tensors[member.tensor].ndim > 1 and not member.reads:
                tensors[member.tensor].index_fill_(member.dim, torch.tensor([3, 50]), 0)
        for member in heads.members:
            if member.reads:
                tensors[member.tensor].index_fill_(member.dim, torch.arange(16), 0)
    before, plan = outputs(model, inputs), dead_units(model, graph)
    assert removed(plan) == {heads.name: [0], neurons.name: [3, 50]}
    shrink(model, graph, plan)
    assert difference(before, outputs(model, inputs)) < 1e-12
