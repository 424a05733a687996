"""Which layers of a model can go whole: those that add something to what they are given, and do nothing else.

Every entry of a module list is traced by itself, on what it is given while the model runs. Its result must be its input
plus terms that are zero where its parameters are, and its input the very result of the entry before it. Whether the
rest of the model bears the cut is for `depth` to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from hf_prune.graph.axes import size
from hf_prune.graph.flow import FOLLOWED, Flow
from hf_prune.graph.rules import twin_name, view
from hf_prune.graph.trace import (
    Inputs,
    Operation,
    Trace,
    answers,
    call,
    distinct_tensors,
    evaluating,
    names_of_parameters,
    record,
)
from hf_prune.types import LayerStack, PruneError, StackLayer

SAME = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"} | {
    *("contiguous", "clone", "to", "_to_copy", "type_as", "alias", "detach", "dropout")
}
"""Operations that, in evaluation mode, leave every value, in order."""
ZERO_FOR_ZEROS = {*view.RULES, *FOLLOWED, *SAME, "getitem", "slice", "select", "roll", "pad", "constant_pad_nd"} | {
    *("relu", "gelu", "silu", "tanh", "neg", "mean", "sum", "avg_pool2d", "max_pool2d", "upsample_bilinear2d")
}
"""Operations that give zeros where their first argument is zero."""
WEIGHTED = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), ((0, 1), (2,))),
    **dict.fromkeys(("layer_norm", "group_norm"), ((0, 2), (3,))),
    "rms_norm": ((0, 2), ()),
    "batch_norm": ((1,), (2,)),
    "addmm": ((1, 2), (0,)),
    **dict.fromkeys(("matmul", "mm", "bmm", "mul"), ((0, 1), ())),
    "div": ((0,), ()),
    "scaled_dot_product_attention": ((2,), ()),
}
"""Operation -> arguments of which one must be zero, and arguments that must be zero or absent, for a result of zero."""
NORMS = ("layer_norm", "rms_norm")


class _Stays(Exception):
    """Why a layer cannot go."""


@dataclass
class _Call:
    """What a module was given and gave; the tensors are kept, so that their identities stay theirs."""

    inputs: Inputs
    results: list[Tensor]


@dataclass
class _Entry:
    """What the trace of a residual layer shows."""

    multiply_adds: float
    normalised: bool
    rectified: bool
    """Whether a relu is on the way from what it is given to its result."""
    adds_to: Tensor


def find_stacks(model: nn.Module, inputs: Inputs, settle: Callable[[LayerStack], LayerStack]) -> dict[str, LayerStack]:
    """Module list -> which of its layers can go, for each list that has such layers; of nested lists the innermost.

    Runs the model once on its own tensors. `settle` leaves of a stack the layers whose loss the model bears.

    Raises:
        PruneError: the tensors are on the meta device.
    """
    if any(tensor.is_meta for tensor in distinct_tensors(model).values()):
        raise PruneError(
            "whole layers are found by running the model, and its tensors are on the meta device; load the weights."
        )
    lists = {path: module for path, module in model.named_modules() if _is_list(module)}
    with _calls(lists) as calls, evaluating(model), torch.no_grad():
        call(model, distinct_tensors(model), inputs)
    names = names_of_parameters(model)
    found: dict[str, LayerStack] = {}
    for path in sorted(lists, key=lambda path: -path.count(".")):
        if not any(inner.startswith(f"{path}.") for inner in found):
            stack = settle(_stack(path, lists[path], calls, names))
            if stack.layers:
                found[path] = stack
    return {path: found[path] for path in lists if path in found}


def _is_list(module: nn.Module) -> bool:
    numbered = [name for name, _ in module.named_children()] == [str(i) for i in range(len(list(module.children())))]
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and numbered


@contextmanager
def _calls(lists: Mapping[str, nn.Module]) -> Iterator[dict[str, list[_Call]]]:
    """Every call of the entries of `lists` that happens inside, by the entry's path."""
    calls: dict[str, list[_Call]] = {}
    handles = []
    for path, stack in lists.items():
        for name, entry in stack.named_children():
            own = calls[f"{path}.{name}"] = []
            handles.append(entry.register_forward_hook(_noting(own), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _noting(calls: list[_Call]) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls.append(_Call(_by_name(module, args, kwargs), answers(result)))

    return note


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The arguments of a call by name; by position where they have none."""
    bound = signature(module.forward).bind(*args, **kwargs)
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    if Parameter.VAR_POSITIONAL in kinds.values():
        return args
    extra = next((name for name, kind in kinds.items() if kind is Parameter.VAR_KEYWORD), "")
    return {**{k: v for k, v in bound.arguments.items() if k != extra}, **bound.arguments.get(extra, {})}


def _stack(path: str, stack: nn.Module, calls: Mapping[str, list[_Call]], names: Mapping[int, list[str]]) -> LayerStack:
    modules, layers, frozen, normalised = list(stack.children()), [], {}, False
    own = [calls[f"{path}.{index}"] for index in range(len(modules))]
    for index, module in enumerate(modules):
        found = [names[id(parameter)] for parameter in module.parameters()]
        try:
            if any(not name.startswith(f"{path}.{index}.") for each in found for name in each):
                raise _Stays("it shares a parameter with another module")
            entry = _read(module, own[index])
            _check_place(entry, index, modules, own)
        except _Stays as reason:
            frozen[index] = str(reason)
        else:
            layers.append(StackLayer(index, tuple(each[0] for each in found), entry.multiply_adds))
            normalised = normalised or entry.normalised
    return LayerStack(path, len(modules), tuple(layers), frozen, normalised)


def _check_place(entry: _Entry, index: int, modules: Sequence[nn.Module], calls: Sequence[list[_Call]]) -> None:
    """Raise where the entry cannot go because of what its neighbours give or read."""
    others = calls[index][0].results[1:]
    if any(_reads(call, other) for later in calls[index + 1 :] for call in later for other in others):
        raise _Stays("later layers read a second result of it")
    before = calls[index - 1] if index else []
    if index and not (before and before[-1].results and before[-1].results[0] is entry.adds_to):
        raise _Stays("it does not add to the result of the layer before it")
    if entry.rectified and not (index and _ends_in_relu(modules[index - 1], before[-1])):
        raise _Stays("a relu follows its sum, and what it is given may be negative")


def _reads(call: _Call, tensor: Tensor) -> bool:
    return any(each is tensor for each in pytree.tree_leaves(call.inputs))


def _ends_in_relu(module: nn.Module, call: _Call) -> bool:
    result = _results(_trace(module, call))[0]
    return isinstance(result, Node) and twin_name(result.target) == "relu"


def _trace(module: nn.Module, call: _Call) -> Trace:
    try:
        return record(module, call.inputs)
    except PruneError as error:
        raise _Stays(f"it cannot be traced by itself: {error}") from error


def _results(trace: Trace) -> list[Any]:
    """The nodes of what was traced gives."""
    return pytree.tree_leaves(next(node for node in trace.graph.nodes if node.op == "output").args)


def _read(module: nn.Module, calls: Sequence[_Call]) -> _Entry:
    """What the trace of `module` shows, on the inputs of its one call."""
    if len(calls) != 1:
        raise _Stays(f"it runs {len(calls)} times in one pass")
    (call,) = calls
    given = [value for value in pytree.tree_leaves(call.inputs) if isinstance(value, Tensor)]
    if not call.results or not any(tensor.shape == call.results[0].shape for tensor in given):
        raise _Stays("its result has another shape than what it is given")
    trace = _trace(module, call)
    places = [node for node in trace.graph.nodes if node.op == "placeholder" and node not in trace.tensors]
    for place, tensor in zip(places, given, strict=True):
        residual = _Residual(trace, place, {name for name, _ in module.named_parameters()})
        if tensor.shape == call.results[0].shape and residual.holds(_results(trace)[0]) and residual.terms:
            return _Entry(_multiply_adds(trace, len(tensor)), residual.normalised, residual.rectified, tensor)
    raise _Stays("its result is not what it is given plus something that is zero where its parameters are")


def _multiply_adds(trace: Trace, samples: int) -> float:
    return sum(size(dim) for dim in Flow(trace).costs) / samples


class _Residual:
    """Tells whether a node is `start` plus terms that are zero where the parameters are."""

    def __init__(self, trace: Trace, start: Node, parameters: set[str]) -> None:
        self.start = start
        self.zero = {node for node, name in trace.tensors.items() if name in parameters}
        self.normalised, self.rectified, self.terms = False, False, 0
        self._silent: dict[Node, bool] = {}

    def holds(self, node: Any) -> bool:
        """Whether `node` is such a sum; notes how many terms it has, and norms (post-norm) and relus over it."""
        if node is self.start:
            return True
        if not isinstance(node, Node) or node.op != "call_function":
            return False
        name = twin_name(node.target)
        if name == "add":
            left, right = node.args[:2]
            self.terms += 1
            return (self.silent(right) and self.holds(left)) or (self.silent(left) and self.holds(right))
        self.normalised |= name in NORMS
        self.rectified |= name == "relu"
        return name in (*SAME, *NORMS, "relu") and self.holds(node.args[0])

    def silent(self, node: Any) -> bool:
        """Whether `node` is zero where the parameters are."""
        if not isinstance(node, Node):
            return node == 0 and node is not False
        if node not in self._silent:
            self._silent[node] = node in self.zero or (node.op == "call_function" and self._gives_zero(node))
        return self._silent[node]

    def _gives_zero(self, node: Operation) -> bool:
        name = twin_name(node.target)
        if name in ("add", "sub"):
            return all(map(self.silent, node.args[:2]))
        if name in WEIGHTED:
            one_of, all_of = ([node.args[i] for i in places if i < len(node.args)] for places in WEIGHTED[name])
            return any(map(self.silent, one_of)) and all(each is None or self.silent(each) for each in all_of)
        if name == "einsum":
            return any(map(self.silent, node.args[1]))
        first = node.args[0]
        return name in ZERO_FOR_ZEROS and all(map(self.silent, first if isinstance(first, list | tuple) else [first]))
