"""Attention scales that code computes from a size: found by making the size pose as another one, kept by the weights.

`q @ k / sqrt(width)` changes its temperature when the width shrinks. Multiplying the query weights by the ratio of the
two scales undoes that, provided the factor reaches nothing else. A scale for which no such weight exists stays pinned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx import Node
from torch.utils import _pytree as pytree

from hf_prune.graph.rules import name_of, view
from hf_prune.graph.trace import Inputs, Operation, Trace, distinct_tensors, record_on
from hf_prune.graph.traced_int import Expression

ATTENTION = "scaled_dot_product_attention"
PRODUCTS = ("matmul", "bmm", "einsum")
PARTIAL = ("split", "split_with_sizes", "chunk", "unbind", "getitem", "slice", "select", "narrow")
"""Operations that give only a part of a tensor."""
MOVES = {*view.RULES, *PARTIAL, "contiguous", "clone", "to", "_to_copy", "dropout", "neg", "alias", "detach"} - {
    "cat",
    "stack",
    "glu",
}
"""Operations that only move values: what goes in multiplied comes out multiplied."""
SUMS = ("add", "sub", "cat", "stack")
"""Operations whose tensors must all be multiplied alike."""
LAYERS = {"linear": (0, 1, 2), "addmm": (1, 2, 0), "conv1d": (0, 1, 2), "conv2d": (0, 1, 2)}
"""Operation -> places of input, weight and bias among its arguments."""


@dataclass(frozen=True)
class Scale:
    """A multiplication of `node` whose factor follows a size, and the weight that can take the factor over."""

    node: Operation
    layer: Operation
    weight: Operation
    bias: Operation | None
    rows: tuple[int, ...]
    """Outputs of the layer that `node` scales."""
    start: Operation
    """From here on the rows are a tensor of their own."""


def constant(node: Operation) -> float:
    """What `node` multiplies by."""
    if name_of(node.target) == ATTENTION:
        scale = node.kwargs.get("scale")
        return node.args[0].meta["val"].shape[-1] ** -0.5 if scale is None else scale
    return node.args[1] if name_of(node.target) == "mul" else 1 / node.args[1]


def find_scales(model: nn.Module, inputs: Inputs, trace: Trace) -> tuple[list[Scale], set[Expression]]:
    """Scales that weights can take over, and the sizes that are free because all their scales are among these."""
    users = _dependents(model, inputs, trace) if trace.uses.floats else {}
    explicit = {node for nodes in users.values() for node in nodes}
    together: dict[tuple[Node, tuple[int, ...]], list[Scale]] = {}
    for node in trace.graph.nodes:
        scale = _scale(trace, node) if node in explicit or _is_implicit(node) else None
        if scale is not None:
            together.setdefault((scale.weight, scale.rows), []).append(scale)
    good = [scale for scales in together.values() if _is_undone(trace, scales) for scale in scales]
    nodes = {scale.node for scale in good}
    return good, {source for source, dependents in users.items() if dependents and dependents <= nodes}


def _is_implicit(node: Operation) -> bool:
    """Attention that takes its scale from the width of the query."""
    return node.op == "call_function" and name_of(node.target) == ATTENTION and node.kwargs.get("scale") is None


def _dependents(model: nn.Module, inputs: Inputs, trace: Trace) -> dict[Expression, set[Node]]:
    """For each size that is used as a float, the nodes whose constants follow it.

    A size for which none is found has an effect that cannot be seen and gets an empty set; where a constant changes
    in a way that no single size explains, all sets are empty.
    """
    random = Random(0)
    logs = {source: random.uniform(1e-3, 2e-3) for source in trace.uses.floats}
    tensors = {name: tensor.detach() for name, tensor in distinct_tensors(model).items()}
    factors = {source: math.exp(log) for source, log in logs.items()}
    probe = record_on(model, tensors, inputs, trace.real, factors)
    found: dict[Expression, set[Node]] = {source: set() for source in logs}
    for old, new in zip(trace.graph.nodes, probe.graph.nodes, strict=False):
        changed = [(a, b) for a, b in zip(floats(old), floats(new), strict=False) if a != b]
        source = _explanation(changed, logs)
        if old.target != new.target or (changed and source is None) or _held(old) != _held(new):
            return {source: set() for source in logs}
        if source is not None:
            found[source].add(old)
    return found


def _held(node: Operation) -> list[float] | None:
    """Values of a tensor that code made from numbers, where it has values."""
    if node.op != "get_attr":
        return None
    held: Tensor = getattr(node.graph.owning_module, node.target)
    return None if held.is_meta or is_fake(held) else held.flatten().tolist()


def floats(node: Operation) -> list[float]:
    """Float constants among the arguments of `node`."""
    return [value for value in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(value, float)]


def _explanation(changed: list[tuple[float, float]], logs: dict[Expression, float]) -> Expression | None:
    """The size of which some power (1, -1, 1/2, -1/2) is the ratio of the only constant that changed."""
    if len(changed) != 1 or changed[0][1] / changed[0][0] <= 0:
        return None
    ratio = abs(math.log(changed[0][1] / changed[0][0]))
    powers = ((source, log * power) for source, log in logs.items() for power in (1, 0.5))
    return next((source for source, log in powers if math.isclose(ratio, log, rel_tol=1e-9)), None)


def _scale(trace: Trace, node: Operation) -> Scale | None:
    """Follow the first factor of what `node` scales up to the layer that made it."""
    name = name_of(node.target)
    if name not in ("mul", "div", ATTENTION) or (name != ATTENTION and not isinstance(node.args[1], float)):
        return None
    path: list[Operation] = []
    source = node.args[0]
    while isinstance(source, Node) and source.op == "call_function":
        name = name_of(source.target)
        if name in LAYERS:
            return _at_layer(trace, node, source, path[::-1])
        if name not in (*MOVES, *PRODUCTS, "mul", "div", "add"):
            return None
        path = [] if name in PRODUCTS else [*path, source]
        source = source.args[0]
    return None


def _at_layer(trace: Trace, node: Operation, layer: Operation, path: list[Node]) -> Scale | None:
    """The rows of `layer` that arrive at the end of `path`, found by sending their numbers along."""
    _, weight, bias = (
        layer.args[place] if place < len(layer.args) else None for place in LAYERS[name_of(layer.target)]
    )
    if weight not in trace.tensors or not (bias is None or bias in trace.tensors):
        return None
    last = max((place for place, each in enumerate(path) if name_of(each.target) in PARTIAL), default=-1)
    if any(name_of(each.target) not in MOVES for each in path[: last + 1]):
        return None
    shape, channel = layer.meta["val"].shape, 1 if name_of(layer.target).startswith("conv") else -1
    numbers = torch.arange(shape[channel]).view([-1 if d == channel % len(shape) else 1 for d in range(len(shape))])
    value: Any = numbers.expand(shape)
    for each in path[: last + 1]:
        function: Any = each.target
        value = function(value, *each.args[1:], **each.kwargs)
    rows = tuple(value.unique().tolist())
    return Scale(node, layer, weight, bias, rows, path[last] if last >= 0 else layer)


def _is_undone(trace: Trace, scales: list[Scale]) -> bool:
    """Whether multiplying the rows of `scales` and dividing at their nodes changes nothing else.

    The degree of a tensor says how often the factor is in it; whatever is not linear must see degree 0.
    """
    if not set(scales[0].weight.users) <= {scale.layer for scale in scales}:
        return False
    nodes, degrees = {scale.node for scale in scales}, {scale.start: 1 for scale in scales}
    for node in trace.graph.nodes:
        if node not in degrees and (node in nodes or any(degrees.get(each) for each in node.all_input_nodes)):
            degree = _degree(node, degrees, node in nodes)
            if degree is None:
                return False
            degrees[node] = degree
    return True


def _degree(node: Operation, degrees: Mapping[Node, int], scaled: bool) -> int | None:
    """Degree of what `node` gives; None where it is not a product of the factor and something else."""
    name = name_of(node.target) if node.op == "call_function" else node.op
    listed = node.args[0] if name in ("cat", "stack") else node.args[1] if name == "einsum" else node.args
    own = [degrees.get(each, 0) if isinstance(each, Node) else 0 for each in listed]
    if name in MOVES:
        return own[0] - scaled
    if name in PRODUCTS or name == "mul":
        return sum(own) - scaled
    if name == "div":
        return own[0] - own[1] - scaled
    if name in SUMS:
        return own[0] if len(set(own)) == 1 else None
    if name == ATTENTION:
        return own[2] if own[0] + own[1] == scaled and not any(own[3:]) else None
    return None


@torch.no_grad()
def rescale(tensors: Mapping[str, Tensor], trace: Trace, ratios: Mapping[Scale, float]) -> None:
    """Multiply the rows of every scale by its ratio, old factor over new; each weight once."""
    once = {(scale.weight, scale.rows): (scale, ratio) for scale, ratio in ratios.items()}
    for scale, ratio in once.values():
        weight = tensors[trace.tensors[scale.weight]]
        rows = torch.tensor(scale.rows, device=weight.device)
        outputs = weight.T if name_of(scale.layer.target) == "addmm" else weight
        outputs[rows] *= ratio
        if scale.bias is not None:
            tensors[trace.tensors[scale.bias]][rows] *= ratio
