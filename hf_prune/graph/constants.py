"""What a tensor holds whatever the input is: a unit whose weights are zero still emits f(bias).

Walks the trace forward from every weight. A row of zeros gives its bias; elementwise functions, norms with fixed
statistics and moves of data hand the constant on until another weight reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from hf_prune.graph.axes import Dim, flat, size
from hf_prune.graph.flow import Flow
from hf_prune.graph.graph import Graph
from hf_prune.graph.rules import name_of, rule_for, view
from hf_prune.graph.rules.pointwise import pointwise
from hf_prune.graph.trace import Operation, Trace, distinct_tensors

PASSING = (
    "transpose permute contiguous view reshape flatten squeeze unsqueeze select slice mean adaptive_avg_pool1d "
    "adaptive_avg_pool2d max_pool1d max_pool2d max_pool3d"
).split()
"""Operations that hand a constant on as long as its dim stays whole: they move, average or pick equal values."""

VIEWS = {*view.RULES, "slice", "select", "narrow", "getitem", "alias", "detach"}
"""Operations whose result may share its memory with what it was made from."""


@dataclass(frozen=True)
class Layer:
    """One use of a weight: a linear map or a convolution."""

    source: Operation
    weight: str
    bias: str | None
    reads: int
    """Dimension of the weight that reads the input; the other one of the first two writes the output."""
    padded: bool
    grouped: bool
    mean: str | None = None
    """Running mean of the batch norm that alone reads the output, if there is one."""


@dataclass(frozen=True)
class Constant:
    """Value of each index of dimension `dim`, equal at all other places; NaN where it depends on the input."""

    dim: int
    values: Tensor


class Constants:
    """Layers of a trace and the constants of its nodes, for the weights that `model` has now."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.flow = graph.flow
        self.tensors = {name: tensor.detach() for name, tensor in distinct_tensors(model).items()}
        self.layers: list[Layer] = []
        self.found: dict[Node, Constant] = {}
        overwritten = _overwritten(graph.flow.trace)
        for node in graph.flow.trace.graph.nodes:
            constant = self._of(node) if node.op == "call_function" else None
            if constant is not None and node not in overwritten and not constant.values.isnan().all():
                self.found[node] = constant

    def read_dim(self, layer: Layer) -> Dim:
        """The dim of the input that `layer` reads."""
        return self.flow.shapes[layer.source][self._channels(layer)]

    def read_by(self, layer: Layer) -> Tensor | None:
        """Constants of that dim, shape `(inputs,)`, if any is known."""
        constant = self.found.get(layer.source)
        rank = len(self.flow.shapes[layer.source])
        return constant.values if constant is not None and constant.dim == self._channels(layer) % rank else None

    def _channels(self, layer: Layer) -> int:
        """Place of the channels of input and output, from the end."""
        rank = self.tensors[layer.weight].ndim
        return 1 - rank if rank > 2 else -1

    def _of(self, node: Operation) -> Constant | None:
        layer = find_layer(self.flow, node)
        if layer is not None:
            self.layers.append(layer)
            return self._emitted(node, layer)
        name = name_of(node.target)
        if name == "batch_norm" and node.args[0] in self.found and not node.args[5]:
            return self._normed(node)
        if name == "cat":
            return self._joined(node)
        if name in PASSING and node.args[0] in self.found:
            return self._passed(node, self.found[node.args[0]].values)
        return self._mapped(node) if rule_for(node.target) is pointwise else None

    def _emitted(self, node: Operation, layer: Layer) -> Constant:
        """Rows of zeros give their bias, and so do depthwise rows of an input that is zero."""
        weight = self.tensors[layer.weight]
        rows = weight if layer.reads else weight.T
        bias = self.tensors[layer.bias] if layer.bias else rows.new_zeros(len(rows))
        silent = ~rows.flatten(1).any(1)
        read = self.read_by(layer)
        if layer.grouped and read is not None and len(read) == len(rows):
            silent |= read == 0
        return Constant(self._channels(layer) % len(self.flow.shapes[node]), torch.where(silent, bias, torch.nan))

    def _normed(self, node: Operation) -> Constant | None:
        constant = self.found[node.args[0]]
        statistics = [self.tensors[self.flow.trace.tensors[each]] if each else None for each in node.args[1:5]]
        if constant.dim != 1:
            return None
        return Constant(1, node.target(constant.values[None], *statistics, *node.args[5:])[0])

    def _joined(self, node: Operation) -> Constant | None:
        """`cat`: constants side by side, unknown for tensors without."""
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(self.flow.shapes[node])
        pieces = [self.found.get(source) for source in node.args[0]]
        known = [piece.values for piece in pieces if piece is not None and piece.dim == dim]
        if not known:
            return None
        widths = [source.meta["val"].shape[dim] for source in node.args[0]]
        values = [
            piece.values if piece is not None and piece.dim == dim else known[0].new_full((width,), torch.nan)
            for piece, width in zip(pieces, widths, strict=True)
        ]
        return Constant(dim, torch.cat(values))

    def _passed(self, node: Operation, values: Tensor) -> Constant | None:
        """The same values at the place where their dim is now, by itself or as a factor of a larger one."""
        wanted = flat(self.flow.shapes[node.args[0]][self.found[node.args[0]].dim])
        places = [
            (place, factors[:first], factors[first + len(wanted) :])
            for place, factors in enumerate(map(flat, self.flow.shapes[node]))
            for first in range(len(factors))
            if wanted and factors[first : first + len(wanted)] == wanted
        ]
        if len(places) != 1:
            return None
        place, outer, inner = places[0]
        return Constant(place, values.view(1, -1, 1).expand(size(outer), -1, size(inner)).flatten())

    def _mapped(self, node: Operation) -> Constant | None:
        """An elementwise function of constants, weights and numbers; zero times anything is zero."""
        rank = len(self.flow.shapes[node])
        sources = [each for each in node.args if isinstance(each, Node)]
        places = {self._place(source, rank) for source in sources if source in self.found}
        if len(places) != 1 or any(isinstance(value, Node) for value in node.kwargs.values()):
            return None
        place = places.pop()
        product = name_of(node.target).rstrip("_") == "mul"
        values = [self._operand(each, place, rank) for each in node.args]
        if not product and any(value is None for value in values):
            return None
        vectors = [value for value in values if isinstance(value, Tensor)]
        values = [torch.full_like(vectors[0], torch.nan) if value is None else value for value in values]
        result = node.target(
            *(value.clone() if isinstance(value, Tensor) else value for value in values), **node.kwargs
        )
        if not result.is_floating_point():
            return None
        unknown = torch.stack([vector.isnan().expand_as(result) for vector in vectors]).any(0)
        result = torch.where(unknown, torch.nan, result)
        if product:
            zero = torch.stack([(vector == 0).expand_as(result) for vector in vectors]).any(0)
            result = torch.where(zero, 0.0, result)
        return Constant(place, result)

    def _place(self, source: Operation, rank: int) -> int:
        """Where the constant dim of `source` is in a result of `rank` dims."""
        return self.found[source].dim + rank - len(self.flow.shapes[source])

    def _operand(self, argument: Any, place: int, rank: int) -> Any:
        """`argument` as it acts on the constant dim: a number, a vector, or None where it depends on the input."""
        if not isinstance(argument, Node):
            return argument
        if argument in self.found:
            return self.found[argument].values
        if argument not in self.flow.trace.tensors:
            return None
        weight = self.tensors[self.flow.trace.tensors[argument]]
        own = place - (rank - weight.ndim)
        spread = own >= 0 and weight.numel() == weight.shape[own]
        return weight.flatten() if spread or weight.numel() == 1 else None


def find_layer(flow: Flow, node: Operation) -> Layer | None:
    """What `node` computes, where that is a linear map or a convolution by a weight of the model."""
    if node.op != "call_function":
        return None
    name, args = name_of(node.target), [*node.args, None, None, None]
    if name == "addmm":
        bias, source, weight, reads = args[0], args[1], args[2], 0
    elif name in ("linear", "conv1d", "conv2d", "conv3d"):
        source, weight, bias, reads = args[0], args[1], args[2], 1
    else:
        return None
    names = flow.trace.tensors
    if weight not in names or (bias is not None and bias not in names):
        return None
    convolution = len(node.args) > 3 and name != "addmm"
    padding = args[4] if convolution and len(node.args) > 4 else 0
    padded = any(padding) if isinstance(padding, list | tuple) else padding not in (0, "valid")
    grouped = convolution and len(node.args) > 6 and node.args[6] != 1
    norm = norm_behind(node)
    mean = None if norm is None or norm.args[5] else names.get(norm.args[3])
    return Layer(source, names[weight], names.get(bias), reads, padded, grouped, mean)


def norm_behind(node: Operation) -> Operation | None:
    """The batch norm that reads `node` and is alone to do so, if there is one."""
    readers = list(node.users)
    found = len(readers) == 1 and readers[0].op == "call_function" and name_of(readers[0].target) == "batch_norm"
    return readers[0] if found and readers[0].args[0] is node else None


def _overwritten(trace: Trace) -> set[Node]:
    """Nodes that change later through a view, as `x` does by `x[:, 0] = y`; in the trace `x` keeps its name."""
    changed: set[Node] = set()
    for node in trace.graph.nodes:
        if node.op == "call_function" and name_of(node.target).endswith("_"):
            source = node.args[0]
            while source.op == "call_function" and name_of(source.target) in VIEWS:
                source = source.args[0]
                changed.add(source)
    return changed
