"""Follows sizes through a running model: shape reads become `TracedInt`, operations remember what they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from hf_prune.graph.table import is_size
from hf_prune.graph.traced_int import Read, TracedInt

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

SHAPE_READS = {vars(torch._C.TensorBase)["shape"].__get__, torch.Tensor.size, torch.Tensor.__len__}


class Provenance(TorchFunctionMode):
    """Active around one traced forward; afterwards `arguments` holds, for nodes that were given sizes, their arguments
    with `TracedInt` objects in place of plain ints."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[Node, Arguments] = {}
        self._running: list[Callable] = []

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(function, FunctionType) and function not in self._running:
            return self._enter(function, args, kwargs)
        if function in SHAPE_READS:
            return _tagged_shape(args[0], function(*args, **kwargs), *args[1:], **kwargs)
        nodes = _tracer().graph.nodes
        last = next(iter(reversed(nodes)))
        result = function(*args, **kwargs)
        offered, slices = list(_ints((args, kwargs))), list(_slices(args))
        if slices or any(isinstance(value, TracedInt) for value in offered):
            self._annotate(last.next, offered, slices)
        return result

    def _enter(self, function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run Python code of torch under this mode: its own shape reads and calls count too."""
        self._running.append(function)
        try:
            with self:
                return _body(function)(*args, **kwargs)
        finally:
            self._running.pop()

    def _annotate(self, node: Any, offered: list[int], slices: list[slice]) -> None:
        """Give `node` and all later nodes the sizes of the call that created them."""
        while node.op != "root":
            bounds = slices.pop(0) if slices and node.target is torch.ops.aten.slice.Tensor else None
            self.arguments[node] = _with_sizes(node, offered) if bounds is None else (_with_bounds(node, bounds), {})
            node = node.next


def _tracer() -> Any:
    """The tracer at work; there is one whenever the mode is active."""
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer


@cache
def _body(function: FunctionType) -> FunctionType:
    """`function` without its opening question whether a mode wants the call: under a mode it would ask for ever."""
    answers = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    body = FunctionType(
        function.__code__,
        {**function.__globals__, **answers},
        argdefs=function.__defaults__,
        closure=function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _tagged_shape(tensor: Tensor, result: Any, dim: int | None = None) -> Any:
    """`result` of reading the shape of `tensor`, as sizes."""
    slot = get_proxy_slot(tensor, _tracer(), None)
    if slot is None:
        return result
    node = slot.proxy.node.name
    if isinstance(result, torch.Size):
        return torch.Size([TracedInt(value, Read(node, index)) for index, value in enumerate(result)])
    return TracedInt(result, Read(node, (dim or 0) % tensor.dim()))


def _ints(value: Any) -> Iterator[int]:
    """Every int in nested arguments, in order; bounds of slices are not among them."""
    if is_size(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _ints(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _ints(item)


def _slices(value: Any) -> Iterator[slice]:
    """Every slice with a bound in nested arguments: those are the ones that become nodes."""
    if isinstance(value, slice) and not (value.start is None and value.stop is None):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _slices(item)


def _with_sizes(node: Any, offered: list[int]) -> Arguments:
    """Arguments of a node with the sizes that its caller passed."""
    given = (node.args, dict(node.kwargs))
    supply = iter(_aligned([int(value) for value in _ints(given)], offered))
    return map_aggregate(given, lambda value: next(supply) if is_size(value) else value)


def _aligned(wanted: list[int], offered: list[int]) -> list[int]:
    """For each number that an operation got, the size that the caller passed at that place; itself where none fits."""
    rest, result = list(offered), []
    for value in wanted:
        position = next((place for place, size in enumerate(rest) if int(size) == value), None)
        result.append(value if position is None else rest[position])
        rest = rest if position is None else rest[position + 1 :]
    return result


def _with_bounds(node: Any, bounds: slice) -> tuple[Any, ...]:
    """Arguments of a slice node with the start and stop that Python code wrote, where they are what the node got."""
    args = list(node.args)
    for place, bound in ((2, bounds.start), (3, bounds.stop)):
        if isinstance(bound, TracedInt) and len(args) > place and int(bound) == args[place]:
            args[place] = bound
    return tuple(args)
