"""Gates on the output channels of layers: where they can stand, how they are put there, and how they fold away exactly.

A `ChannelFunction` stands behind the batch norm that follows a layer, else behind the layer itself, so that a channel
which it silences is zero for every reader. The layers that add into a residual stream share one function, or have one
each under one plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.graph.graph import Graph
from hf_prune.graph.writers import Silence, Writer, writers
from hf_prune.parts import structures
from hf_prune.parts.prunable import prunable_weights
from hf_prune.parts.structures import GroupUnits
from hf_prune.types import PruneError

_MIXES = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class ChannelTarget:
    """A width that can lose channels exactly, and the layers that write it."""

    units: GroupUnits
    writers: tuple[Writer, ...]


def channel_targets(
    model: nn.Module, graph: Graph, *, include: Iterable[str], exclude: Iterable[str], residual: bool
) -> list[ChannelTarget]:
    """Groups that dense layers alone write, chosen by these layers' names, and in which silence leaves no trace.

    include, exclude: globs as in `PruneConfig`; a group with any member in `exclude` stays. residual: also groups that
    several layers write.

    Raises:
        PruneError: nothing is left.
    """
    include, exclude = tuple(include), tuple(exclude)
    weights = prunable_weights(model, include, exclude)
    excluded = prunable_weights(model, exclude, ()).keys() if exclude else set()
    silence, found = Silence(model, graph), []
    for name, group in graph.groups.items():
        layers = () if group.normalised else writers(model, graph, group)
        named = any(f"{writer.layer}.weight" in weights for writer in layers)
        barred = any(member.tensor in excluded for member in group.members)
        few = len(layers) == 1 or residual
        if named and few and not barred and group.size > 1 and silence.leaves_no_trace(name, layers):
            found.append(ChannelTarget(structures.group_structure(group, model), layers))
    if not found:
        raise PruneError(
            f"no width of {type(model).__name__} can carry a gate on its channels (include={include}, "
            f"exclude={exclude}, residual={residual}): it must be written by linear or convolution layers alone, all "
            "of it, under no LayerNorm-like statistics, and be zero further on where they give zero."
        )
    return found


class ChannelFunction(nn.Module):
    """A linear function of the channels behind a layer. Subclasses give `factor`, and may change what `forward` does.

    Parameters and buffers live in the layer's module and so in the model's `state_dict`. `keep` is the plan's.
    """

    keep: Tensor

    def __init__(self, channels: int, like: Tensor) -> None:
        """like: a tensor on the layer's device."""
        super().__init__()
        self.register_buffer("keep", torch.ones(channels, dtype=torch.bool, device=like.device))

    def factor(self) -> Tensor:
        """What outputs are multiplied by in eval mode: `(C,)`, one factor a channel, or a mix Q of shape `(C, C)`."""
        raise NotImplementedError(f"{type(self).__name__} must say by what it multiplies")

    def alive(self) -> Tensor:
        """Channels that are left as things are, bool `(C,)`; all others have a factor (a row) of zeros."""
        return self.keep

    def forward(self, x: Tensor, host: nn.Module) -> Tensor:
        """`x`, which `host` gave, with the function applied."""
        return multiply_channels(x, self.factor(), host)


class ChannelMask(ChannelFunction):
    """Channels that the plan keeps; or, in single passes, all of them times `passing`."""

    def __init__(self, channels: int, like: Tensor) -> None:
        super().__init__(channels, like)
        self.dtype = at_least_float32(like)
        self.passing: Tensor | None = None
        """What channels are multiplied by in the pass under way, `(C,)`; None: by what the plan says."""

    def factor(self) -> Tensor:
        """1 where the plan keeps, else 0."""
        return self.keep.to(self.dtype)

    def forward(self, x: Tensor, host: nn.Module) -> Tensor:
        """`x` times what the pass under way says."""
        return multiply_channels(x, self.factor() if self.passing is None else self.passing, host)


Mask = TypeVar("Mask", bound=ChannelMask)


@contextmanager
def passing(factors: Mapping[Mask, Tensor]) -> Iterator[None]:
    """Multiply by these factors, `(C,)` each, as long as the block runs."""
    for mask, factor in factors.items():
        mask.passing = factor
    try:
        yield
    finally:
        for mask in factors:
            mask.passing = None


class ChannelScale(ChannelFunction):
    """One learned factor a channel, 1 when new."""

    def __init__(self, channels: int, like: Tensor) -> None:
        super().__init__(channels, like)
        self.scale = nn.Parameter(torch.ones(channels, dtype=at_least_float32(like), device=like.device))

    def factor(self) -> Tensor:
        """The scale where kept, else 0."""
        return torch.where(self.keep, self.scale, 0.0)


def at_least_float32(like: Tensor) -> torch.dtype:
    """The dtype of what a gate learns: its steps are below the resolution of bf16."""
    return torch.promote_types(like.dtype, torch.float32)


def multiply_channels(x: Tensor, factor: Tensor, host: nn.Module) -> Tensor:
    """`x`, the output of `host`, times `factor`: `(C,)`, or a mix of shape `(C, C)`."""
    if factor.ndim == 1:
        return x * along_channels(factor, x, host)
    factor = factor.to(x.dtype)
    return F.linear(x, factor) if _channels_last(x, host) else _MIXES[x.ndim](x, along_channels(factor, x, host))


def along_channels(values: Tensor, x: Tensor, host: nn.Module) -> Tensor:
    """`values`, `(..., C)`, in the dtype of `x` and in a shape in which C lies along the channels that `host` gives."""
    values = values.to(x.dtype)
    return values if _channels_last(x, host) else values.view(*values.shape, *[1] * (x.ndim - 2))


def _channels_last(x: Tensor, host: nn.Module) -> bool:
    return isinstance(host, (nn.Linear, Conv1D)) or x.ndim == 2


@cache
def _gated(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with a function behind its output. A class, because a wrapper would rename the tensors of the layer."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.shared_function[0](kind.forward(self, *args, **kwargs), self)

    return type(f"Gated{kind.__name__}", (kind,), {"forward": forward, "plain": kind})


Function = TypeVar("Function", bound=ChannelFunction)


class ChannelGate(Generic[Function]):
    """Functions behind all layers that write one group, under one plan.

    Args:
        target: the group and its layers.
        functions: one for each layer, in the order of `target.writers`; a single one is shared by all.
        kind: what the functions' parameters are called in `Recipe.optimizers`, and they in the layers' modules.
    """

    def __init__(self, target: ChannelTarget, functions: Sequence[Function], kind: str = "gates") -> None:
        self.name, self.writers, self.kind = target.units.name, target.writers, kind
        self.functions = tuple(functions)

    @property
    def function(self) -> Function:
        """The first layer's, which is every layer's where one is shared."""
        return self.functions[0]

    def insert(self, model: nn.Module) -> None:
        """Register each function in the first module that has it, and send the output of all layers through them."""
        each = self.functions if len(self.functions) > 1 else self.functions * len(self.writers)
        for place, (writer, function) in enumerate(zip(self.writers, each, strict=True)):
            host: Any = model.get_submodule(writer.host)
            if place < len(self.functions):
                host.add_module(self.kind, function.train(host.training))
            # In a tuple, so that a function shared by several layers is registered, saved and moved once.
            host.shared_function = (function,)
            host.__class__ = _gated(type(host))  # type: ignore[arg-type]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the functions learn, under `kind`."""
        return ((self.kind, parameter) for function in self.functions for parameter in function.parameters())

    def set_keep(self, keep: Tensor) -> None:
        """Follow the plan."""
        for function in self.functions:
            function.keep.copy_(keep)

    def keep(self) -> Tensor:
        """Channels that are left as things are."""
        return self.function.alive()

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Multiply the functions into the layers of `model` and give their modules their classes back."""
        hosts: list[Any] = [model.get_submodule(writer.host) for writer in self.writers]
        # Those folded before, by a `finalize` that could not go on, have no function any more.
        open_hosts = [
            (w, host) for w, host in zip(self.writers, hosts, strict=True) if hasattr(host, "shared_function")
        ]
        # Of this model, which may be a copy; all before the first fold, as one may depend on the norm of another.
        factors = [host.shared_function[0].factor() for _, host in open_hosts]
        for (writer, host), factor in zip(open_hosts, factors, strict=True):
            host.__class__ = host.plain
            del host.shared_function
            host._modules.pop(self.kind, None)
            fold_channels(model, writer, factor)


@torch.no_grad()
def fold_channels(model: nn.Module, writer: Writer, factor: Tensor) -> None:
    """Make `writer` compute what it does times `factor`, `(C,)` or `(C, C)`; in double precision.

    A norm without scale, or before a mix, is emitted again. Any variance v' is exact with the scale sqrt(v' + eps). It
    is what W' x would have with uncorrelated channels, so that statistics of batches are near it when training goes on.
    """
    layer: Any = model.get_submodule(writer.layer)
    norm: Any = model.get_submodule(writer.norm) if writer.norm is not None else None
    factor = _exact(factor)
    if norm is not None and norm.affine and factor.ndim == 1:
        norm.weight.copy_(factor * _exact(norm.weight))
        norm.bias.copy_(factor * _exact(norm.bias))
        # Zero before the norm too, by which `shrink` knows that the channel is constant further on.
        layer.weight.movedim(writer.dim, 0)[(factor == 0).to(layer.weight.device)] = 0.0
        return
    Q = factor.diag() if factor.ndim == 1 else factor
    if norm is not None:
        Q = _fold_norm(norm, Q)
    layer.weight.copy_(torch.tensordot(Q, _exact(layer.weight), dims=([1], [writer.dim])).movedim(0, writer.dim))
    if layer.bias is not None:
        layer.bias.copy_(Q @ _exact(layer.bias))


def _fold_norm(norm: Any, Q: Tensor) -> Tensor:
    """Give `norm` the statistics and scales under which it takes Q' x for x; returns Q', `(C, C)`."""
    mean, variance = _exact(norm.running_mean), _exact(norm.running_var)
    scale = _exact(norm.weight) if norm.affine else torch.ones_like(variance)
    shift, Q = Q, Q * scale * (variance + norm.eps).rsqrt()
    norm.running_mean.copy_(Q @ mean)
    norm.running_var.copy_(Q.square() @ variance if norm.affine else torch.full_like(variance, 1.0 - norm.eps))
    if norm.affine:
        norm.weight.copy_((_exact(norm.running_var) + norm.eps).sqrt())
        norm.bias.copy_(shift @ _exact(norm.bias))
    return Q


def _exact(tensor: Tensor) -> Tensor:
    """In double precision, on the CPU: not every device has it."""
    return tensor.detach().cpu().double()
