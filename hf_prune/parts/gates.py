"""Modules inserted while a run lasts: a mask over weights, and the same mask with learned scores behind it.

A gate is inserted into the model before anything wraps it, changes nothing when new, and is folded away at the end:
afterwards the model has its own parameters only, with removed units exactly zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from hf_prune.types import PruneError, Structure


class Gate(Protocol):
    """`name` is the key in the plan; `parameters()` yields (kind, parameter), the kind naming an optimizer group."""

    name: str

    def insert(self, model: nn.Module) -> None:
        """Take its place in `model`, whose outputs stay as they are."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What it learns, each with its kind."""

    def set_keep(self, keep: Tensor) -> None:
        """Follow the plan: bool, `(units,)`."""

    def keep(self) -> Tensor:
        """Which units stay as things are: bool, `(units,)`."""

    def fold(self, model: nn.Module) -> None:
        """Leave `model`, or a copy of it, with plain parameters and the outputs that it has in eval mode."""


@runtime_checkable
class ShrinkableGate(Gate, Protocol):
    """A gate that stays in place while units are cut out of the model under it (`Pruner.shrink_now`).

    Its vectors keep one value for each unit of the model as it was attached; `GroupUnits.left` says what is left.
    """

    def suspend(self, model: nn.Module) -> None:
        """Leave plain parameters, with zeros where `keep` says no, until `insert` is called again."""


class _StraightThrough(torch.autograd.Function):
    """`weight` where kept, else 0. Backward: mask for the weight, identity for the scores (Sanh 2020, section 4)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, keep: Tensor, structure: Structure, tensor: str) -> Tensor:
        ctx.save_for_backward(weight, keep)
        ctx.structure, ctx.tensor, ctx.scores_dtype = structure, tensor, scores.dtype
        return _zero_unless(structure.expand(keep, tensor), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, keep = ctx.saved_tensors
        (grad,) = grads
        moved = ctx.structure.view((weight * grad).to(ctx.scores_dtype), ctx.tensor)  # (units, elems)
        grad_scores = moved.sum(-1) if moved.shape[1] > 1 else moved[:, 0]
        return _zero_unless(ctx.structure.expand(keep, ctx.tensor), grad), grad_scores, None, None, None


class Mask(nn.Module):
    """The parametrization of one tensor: zero where the keep mask, which the gate's first tensor owns, says so."""

    keep: Tensor

    def __init__(self, structure: Structure, tensor: str, owner: Self | None, device: torch.device) -> None:
        super().__init__()
        self.structure, self.tensor = structure, tensor
        # In a tuple, so that a mask shared by several tensors is registered, saved and moved once.
        self._owner: tuple[Self, ...] = (owner,) if owner is not None else ()
        if owner is None:
            self.register_buffer("keep", torch.ones(structure.units, dtype=torch.bool, device=device))

    @property
    def owner(self) -> Self:
        """The mask of the gate's first tensor."""
        return self._owner[0] if self._owner else self

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` where kept, else 0."""
        return _zero_unless(self.structure.expand(self.owner.keep, self.tensor), weight)


class ScoreMask(Mask):
    """A mask whose scores learn from every gradient of the weight, also where the weight is masked.

    A one-dimensional tensor of the structure (bias, norm parameter) is masked but teaches the scores nothing.
    """

    def __init__(
        self, structure: Structure, tensor: str, owner: Self | None, device: torch.device, init: float = 0.0
    ) -> None:
        super().__init__(structure, tensor, owner, device)
        if owner is None:
            # fp32 whatever the weights are: a step of 1e-2 is below the resolution of bf16 from |score| = 4 on.
            self.scores = nn.Parameter(torch.full((structure.units,), init, dtype=torch.float32, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` where kept, else 0."""
        if weight.ndim == 1:
            return super().forward(weight)
        owner = self.owner
        return _StraightThrough.apply(weight, owner.scores, owner.keep, self.structure, self.tensor)


class MaskGate:
    """One mask over all tensors of a structure; units removed by the plan are zero while the dense weights live on."""

    mask_type: type[Mask] = Mask

    def __init__(self, structure: Structure, device: torch.device, **mask_arguments: Any) -> None:
        self.structure = structure
        self.name = structure.name
        self.masks = {
            structure.tensors[0]: self.mask_type(structure, structure.tensors[0], None, device, **mask_arguments)
        }
        for tensor in structure.tensors[1:]:
            self.masks[tensor] = self.mask_type(structure, tensor, self.owner, device, **mask_arguments)

    @property
    def owner(self) -> Mask:
        """The mask that holds the keep vector, and the scores where they are learned."""
        return self.masks[self.structure.tensors[0]]

    def insert(self, model: nn.Module) -> None:
        """Put a mask over every tensor of the structure."""
        for tensor, mask in self.masks.items():
            module, attribute = _locate(model, tensor)
            parametrize.register_parametrization(module, attribute, mask)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The learned scores, where there are any, under the kind "scores"."""
        return self.owner.named_parameters()

    def set_keep(self, keep: Tensor) -> None:
        """Mask what the plan removes, until it says otherwise."""
        self.owner.keep.copy_(keep)

    def keep(self) -> Tensor:
        """The plan as it was last set."""
        return self.owner.keep

    def fold(self, model: nn.Module) -> None:
        """Bake the masked value into each tensor of `model`, which may be a copy of the model that holds the gate."""
        for tensor in self.masks:
            module, attribute = _locate(model, tensor)
            if parametrize.is_parametrized(module, attribute):  # one removal bakes all masks of the tensor
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)

    @torch.no_grad()
    def suspend(self, model: nn.Module) -> None:
        """Take the masks away; what they remove at present is zero in the parameters."""
        for tensor in self.masks:
            module, attribute = _locate(model, tensor)
            if parametrize.is_parametrized(module, attribute):
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            parameter = getattr(module, attribute)
            parameter.copy_(_zero_unless(self.structure.expand(self.keep(), tensor), parameter))


class ScoreGate(MaskGate):
    """A mask with one learned score per unit."""

    mask_type: type[ScoreMask] = ScoreMask
    owner: ScoreMask

    def scores(self) -> Tensor:
        """The learned scores `(units,)`, without gradient."""
        return self.owner.scores.detach()


def copy_with_gates(model: nn.Module) -> nn.Module:
    """A deep copy whose gates can be folded alone.

    torch keeps the parametrized attribute on a class made for the module, which a plain copy shares: folding the copy
    would take the attribute away from the original.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    return copied


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put the modules, parameters, buffers and hooks of `model` back where they were if the block raises.

    Values are not put back: inserting gates does not touch them.
    """
    # Parametrizing swaps a module's class and moves its parameters.
    before = [(module, type(module), _copied(vars(module))) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in attributes.items()}


def refuse_parametrized(model: nn.Module, tensors: Iterable[str]) -> None:
    """Raise unless every tensor is a plain parameter: masks do not stack on another tool's parametrization."""
    for tensor in tensors:
        module, attribute = _locate(model, tensor)
        if parametrize.is_parametrized(module, attribute):
            other = type(parametrizations(module, attribute)[0]).__name__
            raise PruneError(
                f"{tensor!r} already has a parametrization ({other}); "
                "finish the other run first (Pruner.finalize) or remove it with torch.nn.utils.parametrize."
            )


def parametrizations(module: nn.Module, attribute: str) -> ParametrizationList:
    """What stands between the trained parameter `attribute` of a parametrized module and its readers."""
    return cast(ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[attribute])


def _zero_unless(keep: Tensor, values: Tensor) -> Tensor:
    """`values` where kept, else +0.0 (a product would leave -0.0, which is no zero to an encoding)."""
    return torch.where(keep, values, values.new_zeros(()))


def _locate(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    path, _, attribute = tensor.rpartition(".")
    return model.get_submodule(path), attribute
