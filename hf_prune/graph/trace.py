"""One run of a model on fake tensors, recorded as a graph of ATen operations with the source of every size.

The graph is taken before dispatch (`linear`, `conv2d`, `scaled_dot_product_attention`, `view` stay whole). Fake tensors
need neither memory nor gradients, so frozen, huge and meta-device models trace alike; a model whose control flow reads
tensor values is run on its real tensors instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from hf_prune.graph.attributes import preserved, tag
from hf_prune.graph.caches import without_caches
from hf_prune.graph.provenance import Arguments, Provenance
from hf_prune.graph.traced_int import Expression, Uses, recording
from hf_prune.types import PruneError

Operation = Any
"""A node of the traced graph; fx types the arguments of its nodes too loosely to be of use."""

Inputs = Mapping[str, Any] | tuple[Any, ...]

WRAPPED = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Class of torch that wraps a model -> where it keeps it. By name, as importing the compiler takes seconds."""

AUXILIARY = ("hidden_state", "attentions", "past_key_values", "loss")
"""Fields of a model output that are no reason to keep a width, as long as another field holds the answer."""


@dataclass
class Trace:
    """Operations of one run, in order. `arguments` has a node's ints as `TracedInt` where their source is known."""

    graph: FxGraph
    tensors: dict[Node, str]
    arguments: dict[Node, Arguments]
    uses: Uses
    real: bool
    """True where fake tensors were not enough and the model ran on its own tensors."""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `PruneError` for what is not the model itself: wrappers, and models that live elsewhere between calls."""
    wrapped = WRAPPED.get(type(model).__name__)
    if wrapped:
        raise PruneError(
            f"model must be the bare model, got it wrapped in {type(model).__name__}. Pass model.{wrapped}, and "
            "compile or wrap what comes out."
        )
    for path, module in model.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise PruneError(
                f"module {path!r} is offloaded by accelerate: its weights are not in the model. Remove the hooks first "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), or load without offloading."
            )


def as_arguments(inputs: Any) -> Inputs:
    """Example inputs as a plain dict of keywords or a tuple of positions; one tensor alone is the first argument."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,)
    if isinstance(inputs, tuple | list):
        return tuple(inputs)
    raise PruneError(
        f"example_inputs must be a dict of keywords, a tuple of positional tensors, or one tensor, got "
        f"{type(inputs).__name__}."
    )


def record(model: nn.Module, inputs: Inputs) -> Trace:
    """Trace `model` in evaluation mode; leaves its mode, attributes and tensors as they were."""
    tensors = {name: tensor.detach() for name, tensor in distinct_tensors(model).items()}
    try:
        return record_on(model, tensors, inputs, real=False)
    except Exception as error:
        if any(tensor.is_meta for tensor in tensors.values()):
            raise _failure(model, error, "on the meta device") from error
    try:
        return record_on(model, tensors, inputs, real=True)
    except Exception as error:
        raise _failure(model, error, "on its own tensors") from error


def _failure(model: nn.Module, error: Exception, where: str) -> PruneError:
    hint = "Check that model(**example_inputs) runs, and pass inputs of the kind that the model is used with."
    if "dynamo-optimized" in str(error):
        hint = "It calls compiled code; trace it without, as after model.set_attn_implementation('sdpa')."
    operation = next((word for word in str(error).split() if word.startswith("aten.")), "its forward")
    return PruneError(
        f"{type(model).__name__} could not be traced {where}: {operation} raised {type(error).__name__}: {error}. "
        f"{hint}"
    )


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """`id` of each parameter -> all its names: a shared one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def call(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    """The tensors that `model` answers with when its parameters and buffers are `tensors`."""
    return answers(functional_call(model, dict(tensors), *arguments(model, inputs)))


def arguments(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How to call `model` on `inputs`, without caches for later tokens."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    if "use_cache" in signature(model.forward).parameters:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def answers(output: Any) -> list[Tensor]:
    """The tensors of a model output, without hidden states and caches where another field holds the answer."""
    if isinstance(output, Mapping):
        main = {key: value for key, value in output.items() if not any(word in key for word in AUXILIARY)}
        return [tensor for value in (main or output).values() for tensor in answers(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in answers(value)]
    return [output] if isinstance(output, Tensor) else []


def _fake_like(tensor: Tensor) -> Tensor:
    """A CPU tensor of the same layout; fake under a fake mode, whatever the device of `tensor`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def record_on(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    real: bool,
    factors: Mapping[Expression, float] | None = None,
) -> Trace:
    """Trace `model` as if `tensors` were its own; `real` runs on their values instead of fakes."""
    values, layout = pytree.tree_flatten(inputs)
    given = [value for value in values if isinstance(value, Tensor)]
    provenance = Provenance()

    def run(own: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        supply = iter(given)
        inputs = [next(supply) if isinstance(value, Tensor) else value for value in values]
        with provenance:
            return call(model, dict(zip(tensors, own, strict=True)), pytree.tree_unflatten(inputs, layout))

    example = list(tensors.values()), given
    if not real:
        with FakeTensorMode(allow_non_fake_inputs=True):
            example = pytree.tree_map(_fake_like, example)
    tracer = make_fx(
        run, tracing_mode="real" if real else "fake", pre_dispatch=True, _error_on_data_dependent_ops=False
    )
    with torch.no_grad(), _quiet(), without_caches(model), preserved(model), recording(factors or {}) as uses:
        vars(model).pop("forward", None)  # accelerate puts one with autocast before the model's own
        for module in model.modules():
            vars(module).pop("_compiled_call_impl", None)  # of module.compile(), which cannot be traced
        model.train()  # modules that cache what they made of their weights drop it when training begins
        model.eval()
        tag(model)
        graph = tracer(*example).graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return Trace(graph, dict(zip(placeholders, tensors, strict=False)), provenance.arguments, uses, real)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; modes and torch's random state come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=()):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Fake tensors log what they cannot do before raising it; the real run comes next, so nobody needs to know."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
