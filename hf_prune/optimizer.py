"""An optimizer around any optimizer: gradient transforms before the step, projections after it, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_prune.graph import select
from hf_prune.types import PruneError

OWN_STATE = "hf_prune"


class Stateful(Protocol):
    """What can be saved and restored with an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and tensors, which `torch.load(weights_only=True)` reads."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


@dataclass
class StepRules:
    """What happens around every step of the inner optimizer."""

    transforms: Mapping[nn.Parameter, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Rewrites of gradients; they see gradients that are clipped and free of any loss scale."""
    projections: Sequence[Callable[[], None]] = ()
    """Edits of parameters in place, after the step."""
    trainable: Callable[[nn.Parameter], bool] | None = None
    """Asked before each step; a parameter for which it says False keeps its value in this step."""
    lr_scale: Callable[[], float] | None = None
    """Factor on every learning rate of this step alone."""


class PruneOptimizer(torch.optim.Optimizer):
    """Delegates to `inner`, and applies `rules` around its step.

    Args:
        inner: the user's optimizer; it also steps the groups that were added for scores and gates.
        rules: what the method does around the step.
        extras: optimizers of their own for parameter kinds whose step size means something in their paper.
        saved: what is saved and restored together with the optimizer's own state, under one key.
    """

    inner: torch.optim.Optimizer
    rules: StepRules
    extras: tuple[torch.optim.Optimizer, ...]
    saved: dict[str, Stateful]

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        rules: StepRules,
        extras: Sequence[torch.optim.Optimizer] = (),
        saved: Mapping[str, Stateful] | None = None,
    ) -> None:
        if isinstance(inner, PruneOptimizer):
            raise PruneError("the optimizer is already wrapped by a Pruner; wrap the plain torch optimizer, once.")
        # The base class would copy the parameter groups, and copies stop being shared after `load_state_dict`.
        # Its `__setstate__` prepares hooks and profiling without groups.
        self.__setstate__({"inner": inner, "rules": rules, "extras": tuple(extras), "saved": dict(saved or {})})

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("inner", "rules", "extras", "saved")}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of every inner optimizer; the dicts are shared with them, so schedulers reach all."""
        if not self.extras:
            return self.inner.param_groups
        return [group for optimizer in self._all for group in optimizer.param_groups]

    @property
    def state(self) -> Mapping[Tensor, Any]:  # type: ignore[override]
        """Moments by parameter, of every inner optimizer."""
        if not self.extras:
            return self.inner.state
        return {parameter: state for optimizer in self._all for parameter, state in optimizer.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The user's optimizer's."""
        return self.inner.defaults

    @property
    def _all(self) -> tuple[torch.optim.Optimizer, ...]:
        return (self.inner, *self.extras)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the user's optimizer one more group."""
        self.inner.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of every inner optimizer's parameters."""
        for optimizer in self._all:
            optimizer.zero_grad(set_to_none)

    def train(self) -> None:
        """Switch inner optimizers that keep other weights for training than for evaluation (schedule-free ones)."""
        self._switch("train")

    def eval(self) -> None:
        """The other way round."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        for optimizer in self._all:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every inner optimizer. A closure is evaluated once, before the gradients are rewritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._rewrite_gradients()
        with self._scaled_rates():
            for optimizer in self._all:
                optimizer.step()
        for project in self.rules.projections:
            project()
        return loss

    def _rewrite_gradients(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.rules.trainable is not None and not self.rules.trainable(parameter):
                    parameter.grad = None  # a zero gradient would still decay and carry momentum
                elif parameter in self.rules.transforms:
                    parameter.grad = self.rules.transforms[parameter](parameter.grad)

    def moments(self) -> list[dict[str, Any]]:
        """What the inner optimizers remember of each parameter, in the order of the groups; copies in main memory."""
        states = (optimizer.state.get(parameter, {}) for optimizer, parameter in self._owned())
        return [{key: _in_main_memory(value) for key, value in state.items()} for state in states]

    def set_moments(self, moments: Sequence[Mapping[str, Any]]) -> None:
        """Return to what `moments` gave; learning rates and all else of the groups stay."""
        for (optimizer, parameter), saved in zip(self._owned(), moments, strict=True):
            state = optimizer.state[parameter]
            for key in state.keys() - saved.keys():
                del state[key]
            for key, value in saved.items():
                if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                    state[key].copy_(value)  # stays on its device
                else:
                    state[key] = _in_main_memory(value)

    def _owned(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter]]:
        for optimizer in self._all:
            for group in optimizer.param_groups:
                yield from ((optimizer, parameter) for parameter in group["params"])

    @contextmanager
    def _scaled_rates(self) -> Iterator[None]:
        if self.rules.lr_scale is None:
            yield
            return
        scale, rates = self.rules.lr_scale(), [(group, group["lr"]) for group in self.param_groups]
        for group, rate in rates:
            group["lr"] = rate * scale
        try:
            yield
        finally:
            for group, rate in rates:
                group["lr"] = rate

    def obstacle(self) -> str | None:
        """Why `slice` cannot cut the state, if something in it is neither a number nor like its parameter."""
        for optimizer in self._all:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    shape = tuple(value.shape) if isinstance(value, Tensor) else None
                    if isinstance(value, (list, dict)) or shape not in (None, (), (1,), tuple(parameter.shape)):
                        kind = f"of shape {shape}" if shape else "that is no tensor"
                        return (
                            f"{type(optimizer).__name__} keeps {name!r} {kind} for a parameter of shape "
                            f"{tuple(parameter.shape)}, which does not say what belongs to which unit"
                        )
        return None

    @torch.no_grad()
    def slice(self, parameter: nn.Parameter, shape: tuple[int, ...], indices: Sequence[Tensor]) -> None:
        """Keep the given indices of each dimension of what the state has in `shape`, the parameter's before its cut."""
        self._rewrite_moments(parameter, shape, lambda moment: select(moment, indices))

    @torch.no_grad()
    def erase(self, parameter: nn.Parameter, keep: Tensor) -> None:
        """Set what the state has for entries that `keep` drops to zero; bool, of the shape of `parameter`."""
        self._rewrite_moments(parameter, tuple(parameter.shape), lambda moment: torch.where(keep, moment, 0.0))

    def _rewrite_moments(
        self, parameter: nn.Parameter, shape: tuple[int, ...], rewrite: Callable[[Tensor], Tensor]
    ) -> None:
        for optimizer in self._all:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and tuple(value.shape) == shape:
                    state[name] = rewrite(value)

    def state_dict(self) -> dict[str, Any]:
        """The user's optimizer's state, and under one more key that of the rest."""
        own = {
            "extras": [optimizer.state_dict() for optimizer in self.extras],
            "saved": {name: part.state_dict() for name, part in self.saved.items()},
        }
        return {**self.inner.state_dict(), OWN_STATE: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            PruneError: the state was written without a Pruner, or by another method.
        """
        own = state_dict.get(OWN_STATE)
        if own is None or own["saved"].keys() != self.saved.keys() or len(own["extras"]) != len(self.extras):
            raise PruneError(
                "the optimizer state was not written by this pruning run "
                f"({'no' if own is None else 'another'} pruning state in it); resume with the same pruning config, "
                "or start a new run from the checkpoint's weights."
            )
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != OWN_STATE})
        for optimizer, state in zip(self.extras, own["extras"], strict=True):
            optimizer.load_state_dict(state)
        for name, part in self.saved.items():
            part.load_state_dict(own["saved"][name])


def move_to_group(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], **options: Any) -> None:
    """Take `parameters` out of the optimizer's groups and give them one of their own with `options` (lr, ...)."""
    remove_from_groups(optimizer, parameters)
    optimizer.add_param_group({"params": list(parameters), **options})


def remove_from_groups(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Take `parameters` out of every group of an optimizer that has not stepped them yet."""
    moved = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]


def _in_main_memory(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
