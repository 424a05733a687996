"""Layer-wise relevance: how much of an answer came through each activation, layer by layer from the logits back.

While `propagating` is on, torch's functions run as always, but what autograd carries back through them is relevance:
each operation hands what it receives to its inputs by a rule. An operation without a rule is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_prune.types import PruneError

WEIGHTED = ("linear", "conv1d", "conv2d", "conv3d", "addmm")
"""The alpha-beta rule."""
UNCHANGED = (
    "relu relu6 gelu silu hardswish hardtanh leaky_relu elu tanh mish batch_norm layer_norm group_norm rms_norm "
    "dropout dropout2d to float type_as contiguous clone neg __neg__"
).split()
"""Relevance passes as it is: activations, norms, casts."""
SHARED = "add __add__ __iadd__ __radd__ mean avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d".split()
"""Each input gets the part that its value is of the sum."""
MOVED = (
    "max_pool1d max_pool2d adaptive_max_pool2d reshape view flatten permute transpose squeeze unsqueeze __getitem__ "
    "chunk split cat select narrow expand T pad roll repeat repeat_interleave stack"
).split()
"""Values are picked or moved: the gradient does with relevance what it should."""
ATTENTION = {"scaled_dot_product_attention": 2, "matmul": 1, "bmm": 1, "__matmul__": 1}
"""Place of the values; the other arguments, the probabilities, count as constants."""
CONSTANT = ("softmax", "sigmoid", "hardsigmoid", "pow")
"""Probabilities, gates, and what norms and activations in Python divide or multiply by: nothing passes."""
SCALED = ("mul", "__mul__", "__imul__", "__rmul__", "div", "__truediv__")
"""The first argument that carries relevance gets it all; a gate beside it counts as a constant."""
Back = Callable[[Tensor], list[Tensor]]
"""Relevance of what an operation gives -> that of each input."""
_TINY = 1e-9  # the authors' stabiliser


class _Rule(torch.autograd.Function):
    """The value that the operation has, and relevance handed back by `back(relevance) -> one tensor an input`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, back: Callable[[Tensor], list[Tensor]], *inputs: Tensor
    ) -> Any:
        ctx.back = back
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            return (None, None, None, *ctx.back(relevance[0]))


class _Propagation(TorchFunctionMode):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.anchor = torch.zeros((), requires_grad=True)  # makes what weights put out part of the graph

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, original = kwargs or {}, getattr(function, "__name__", "")
        name = original if original.startswith("__") else original.strip("_")  # relu_, _max_pool2d
        if name in WEIGHTED:
            return self._weighted(function, name, args, kwargs)
        carrying = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
        if not carrying and not _carries(args):
            return function(*args, **kwargs)
        if name in UNCHANGED:
            return self._ruled(function(*_constant(args), **kwargs), lambda relevance: [relevance], args[0])
        if name in SCALED:
            value = function(*_constant(args), **kwargs)
            return self._ruled(value, lambda relevance: [_folded(relevance, carrying[0])], carrying[0])
        if name in SHARED:
            return self._shared(partial(_called, function, args, kwargs, carrying), carrying)
        if name in ATTENTION:
            values = args[ATTENTION[name]]
            return self._shared(partial(_called, function, args, kwargs, [values]), [values])
        if name in CONSTANT:
            return function(*_constant(args), **kwargs)
        result = function(*args, **kwargs)
        if name in MOVED or not _carries([result]):
            return result
        raise PruneError(f"relevance cannot pass {name}: it has no rule for it; choose another method or model.")

    def _ruled(self, value: Tensor, back: Back, *inputs: Tensor) -> Tensor:
        return _Rule.apply(self.anchor, value, back, *inputs)

    def _shared(self, run: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
        inputs = list(inputs)
        value = run(*[each.detach() for each in inputs])

        def back(relevance: Tensor) -> list[Tensor]:
            share = relevance / (value + torch.where(value >= 0, _TINY, -_TINY))
            leaves = [each.detach().requires_grad_() for each in inputs]
            parts = torch.autograd.grad(run(*leaves), leaves, share)
            return [leaf.detach() * part for leaf, part in zip(leaves, parts, strict=True)]

        return self._ruled(value, back, *inputs)

    def _weighted(self, function: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        """The alpha-beta rule; biases take nothing."""
        if name == "addmm":
            x, weight, run = args[1], args[2], torch.mm
        else:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            rest = {key: value for key, value in kwargs.items() if key not in ("bias", "weight")}
            run = partial(_unbiased, function, args[3:], rest)
        value = function(*_constant(args), **kwargs)
        back = partial(alpha_beta, run, x.detach(), weight.detach(), alpha=self.alpha)
        return self._ruled(value, lambda relevance: [back(relevance)], x)


def alpha_beta(
    run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, relevance: Tensor, *, alpha: float
) -> Tensor:
    """R_i = x_i sum_j (alpha w+_ij R_j / z+_j - beta w-_ij R_j / z-_j) with beta = alpha - 1, `(...)` as `x`.

    A negative input turns signs around. Where all contributions to an output have one sign, they take all of it.
    """
    leaf = x.clone().requires_grad_()
    rising, falling = weight.clamp(min=0), weight.clamp(max=0)
    above, below = leaf.clamp(min=0), leaf.clamp(max=0)
    signed = bool((x < 0).any())
    positive = run(above, rising) + (run(below, falling) if signed else 0.0)
    negative = run(above, falling) + (run(below, rising) if signed else 0.0)
    has_positive, has_negative = positive.detach() > 0, negative.detach() < 0
    both = has_positive & has_negative
    up = torch.where(both, alpha, 1.0) * has_positive * relevance / (positive.detach() + _TINY)
    down = torch.where(both, 1.0 - alpha, 1.0) * has_negative * relevance / (negative.detach() - _TINY)
    (parts,) = torch.autograd.grad([positive, negative], leaf, [up, down])
    return x * parts


def _unbiased(function: Any, rest: Any, kwargs: Any, x: Tensor, weight: Tensor) -> Tensor:
    return function(x, weight, None, *rest, **kwargs)


def _called(function: Any, args: Any, kwargs: Any, replaced: list[Tensor], *inputs: Tensor) -> Tensor:
    """`function(*args)` with `inputs` in the places of `replaced`, out of place, everything else constant."""
    found = {id(old): new for old, new in zip(replaced, inputs, strict=True)}
    own = [found.get(id(each), each.detach() if isinstance(each, Tensor) else each) for each in args]
    return torch.add(*own, **kwargs) if "add" in function.__name__ else function(*own, **kwargs)


def _constant(args: Any) -> list[Any]:
    return [each.detach() if isinstance(each, Tensor) else each for each in args]


def _carries(values: Any) -> bool:
    """Whether some tensor among nested values carries relevance."""
    if isinstance(values, list | tuple):
        return any(map(_carries, values))
    return isinstance(values, Tensor) and values.requires_grad


def _folded(relevance: Tensor, like: Tensor) -> Tensor:
    return relevance.sum_to_size(like.shape)


@contextmanager
def propagating(model: nn.Module, alpha: float) -> Iterator[None]:
    """Run `model` so that `torch.autograd.grad(logits, activations, relevance)` gives the activations' relevance."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad(), _Propagation(alpha):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
