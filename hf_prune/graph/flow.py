"""Dims of every tensor of a trace: runs the rules over the graph, then adds what sizes in code demand."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from hf_prune.graph.axes import Dim, Shape, freeze, fresh
from hf_prune.graph.equations import Equations
from hf_prune.graph.rules import name_of, rule_for
from hf_prune.graph.scales import Scale
from hf_prune.graph.trace import Operation, Trace
from hf_prune.graph.traced_int import Expression, holds_attribute

FOLLOWED = ("transpose", "t", "permute", "to", "contiguous", "detach", "alias", "clone", "numpy_T")
"""Operations through which a tensor of the model is still the weight of a contraction."""

EMPTY_ALLOWED = ("slice", "narrow", "split", "split_with_sizes", "cat", "expand", "to", "contiguous")
"""Operations that do the same, or nothing, where a size happens to be zero."""


class Flow:
    """Shapes of all nodes and tensors, which dims contractions read, and what each operation costs."""

    def __init__(self, trace: Trace, scales: Iterable[Scale] = (), free: Collection[Expression] = ()) -> None:
        """scales: attention scales that weights take over.  free: sizes that formulas may follow for that reason."""
        self.trace = trace
        self.scales = {scale.node: scale for scale in scales}
        self.shapes: dict[Node, Any] = {}
        self.tensors: dict[str, Shape] = {}
        self.reads: set[tuple[str, int]] = set()
        self.costs: list[Dim] = []
        """One dim an operation; its size is the number of multiply-adds."""
        self.live = _live(trace)
        named: dict[str, Any] = {}
        self.equations = Equations(named)
        for node in trace.graph.nodes:
            self._visit(node)
            named[node.name] = self.shapes.get(node)
        for left, right in trace.uses.equal:
            self.equations.compare(left, right)
        for left, right in trace.uses.ordered:
            if not (holds_attribute(left) or holds_attribute(right)):
                self.equations.fix(left, right)
        for expression in trace.uses.floats:
            if expression not in free:
                self.equations.pin(expression)

    def _visit(self, node: Operation) -> None:
        if node in self.trace.tensors:
            shape = _unknown(node, None if node.users else "no operation uses it")
            self.shapes[node] = self.tensors[self.trace.tensors[node]] = shape
        elif node.op in ("placeholder", "get_attr"):
            self.shapes[node] = _unknown(node, "model input" if node.op == "placeholder" else "constant in code")
        elif node.op == "call_function":
            self.shapes[node] = self._apply(node)
        else:
            _freeze_all(map_arg(node.args, self.shapes.get), "model output")

    def _apply(self, node: Operation) -> Any:
        args, kwargs = map_arg(self.trace.arguments.get(node, (node.args, dict(node.kwargs))), self.shapes.get)
        if node.target is operator.getitem:
            return args[0][args[1]]
        values = list(_values(node))
        if not values:
            return None
        rule = rule_for(node.target)
        obstacle = _obstacle(node, values)
        if rule is None or obstacle:
            return self._stop(node, (args, kwargs), obstacle or f"operation {name_of(node.target)} is not known")
        result = rule(self, node, *args, **kwargs)
        if [shape.sizes for shape in _shapes_in(result)] != [tuple(value.shape) for value in values]:
            return self._stop(node, (args, kwargs), f"the rule of {name_of(node.target)} disagrees with its result")
        return result

    def _stop(self, node: Operation, inputs: Any, reason: str) -> Any:
        """Freeze everything that goes into `node`; what comes out is new and frozen too."""
        _freeze_all(inputs, reason)
        return _unknown(node, reason)

    def is_weight(self, node: Any) -> bool:
        """True for a parameter or buffer of the model, also where it was only turned around or cast."""
        return self._origin(node) in self.trace.tensors

    def consume(self, node: Operation, dim: int) -> None:
        """Note that a contraction sums over dimension `dim` of `node`, where that is a tensor of the model."""
        wanted, origin = self.shapes[node][dim], self._origin(node)
        if origin in self.trace.tensors:
            name = self.trace.tensors[origin]
            self.reads.update((name, i) for i, each in enumerate(self.shapes[origin]) if each is wanted)

    @staticmethod
    def _origin(node: Any) -> Any:
        while isinstance(node, Node) and node.op == "call_function" and name_of(node.target) in FOLLOWED:
            node = node.args[0]
        return node

    def cost(self, *dims: Dim) -> None:
        """Note an operation of as many multiply-adds as the product of `dims`."""
        self.costs.append(tuple(axis for dim in dims for axis in dim))


def _obstacle(node: Operation, values: list[Tensor]) -> str | None:
    """Why no rule can follow `node`, if there is a reason in its arguments or results."""
    if not all(value.numel() for value in values) and name_of(node.target) not in EMPTY_ALLOWED:
        return "empty tensor"
    schema = getattr(node.target, "_schema", None)
    kinds = (str(argument.type) for argument in (schema.arguments if schema else ()))
    if any("int" in kind and _holds_node(value) for kind, value in zip(kinds, node.args, strict=False)):
        return "a size that is read from data"
    return None


def _holds_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, list | tuple) and any(map(_holds_node, value)))


def _live(trace: Trace) -> set[Node]:
    """Nodes whose values reach the output or change a tensor in place; others are only asked for their shape."""
    live: set[Node] = set()
    for node in reversed(trace.graph.nodes):
        changes = node.op == "call_function" and name_of(node.target).endswith("_")
        if node.op == "output" or changes or any(user in live for user in node.users):
            live.add(node)
    return live


def _values(node: Operation) -> Iterator[Tensor]:
    """The tensors that `node` gives, as the trace saw them."""
    value = node.meta.get("val")
    return (item for item in (value if isinstance(value, tuple | list) else [value]) if isinstance(item, Tensor))


def _unknown(node: Operation, frozen: str | None) -> Any:
    """New axes for what `node` gives."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return [Shape(fresh(count, frozen) for count in item.shape) for item in value]
    return Shape(fresh(count, frozen) for count in value.shape) if isinstance(value, Tensor) else None


def _shapes_in(value: Any) -> Iterator[Shape]:
    """Every shape in nested arguments or results."""
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, dict):
        yield from _shapes_in(tuple(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _shapes_in(item)


def _freeze_all(value: Any, reason: str) -> None:
    for shape in _shapes_in(value):
        for dim in shape:
            freeze(dim, reason)
