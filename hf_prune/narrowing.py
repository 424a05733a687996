"""Units cut out while a run goes on: the model, the optimizer's moments and the gates get narrower together.

Plans, scores and gates stay in units of the model as it was attached. What is gone stands in the model's own state, so
that any checkpoint of the run, loaded into a model of whatever widths, first gives that model its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_prune.config import closest
from hf_prune.graph import Graph, check_plan, kept_entries, narrow, shrink, widen
from hf_prune.graph.lazy import LazyGraph
from hf_prune.optimizer import PruneOptimizer
from hf_prune.parts.gates import ShrinkableGate
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.structures import GroupUnits
from hf_prune.types import Plan, PruneError

STATE = "hf_prune_units"
"""Name of the module, in a model under way, that holds which units are left."""


class UnitsLeft(nn.Module):
    """One bool for each unit of all groups, end to end: a part of the model's state that computes nothing.

    `alive` is False for units that are gone for good; `present` is False where the tensors are without them, too.
    """

    alive: Tensor
    present: Tensor

    def __init__(self, units: int, device: torch.device) -> None:
        super().__init__()
        for name in ("alive", "present"):
            self.register_buffer(name, torch.ones(units, dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself: an `nn.Sequential` calls whatever it holds."""
        return x


class Narrowing:
    """What one run has cut out of `model`, from when it is attached to when it is finalized."""

    def __init__(
        self, model: nn.Module, graph: Graph, structures: Sequence[GroupUnits], gates: Sequence[ShrinkableGate]
    ) -> None:
        self.model, self.graph, self.structures, self.gates = model, graph, structures, gates
        self.kept_whole: str | None = None
        """Why units that go are only masked, if so."""
        units = sum(each.units for each in structures)
        model.add_module(STATE, UnitsLeft(units, next(model.parameters()).device))
        self._hook = model.register_load_state_dict_pre_hook(self._follow)

    def __deepcopy__(self, memo: Any) -> Self:
        """A copy of the model still has the hook, but it is this run's."""
        return self

    @property
    def _state(self) -> UnitsLeft:
        state: UnitsLeft = getattr(self.model, STATE)
        return state

    @property
    def alive(self) -> Plan:
        """Group -> units that are not gone for good."""
        return self._by_group(self._state.alive)

    @property
    def _present(self) -> Plan:
        return self._by_group(self._state.present)

    def _by_group(self, flags: Tensor) -> Plan:
        parts = flags.split([each.units for each in self.structures])
        return {each.name: part for each, part in zip(self.structures, parts, strict=True)}

    def check(self, plan: Plan) -> None:
        """Raise unless `plan` fits groups that have a mask and leaves each some unit that is not gone yet."""
        alive = self.alive
        for name in plan:
            if name not in alive:
                raise PruneError(f"the plan names {name!r}, which has no mask in this run{closest(name, list(alive))}.")
        check_plan(self.graph, plan)
        check_plan(self.graph, {name: keep.to(alive[name].device) & alive[name] for name, keep in plan.items()})

    def cut(self, plan: Plan, optimizer: PruneOptimizer | None) -> None:
        """Let the units that `plan` drops be gone for good, and cut them out unless something forbids it."""
        alive = torch.cat([plan[each.name] for each in self.structures]) & self._state.alive
        if torch.equal(alive, self._state.alive):
            return
        self._check_wholeness(optimizer)
        with self._suspended_gates():
            if self.kept_whole is None:
                self._resize(self._exact(self._by_group(alive)), optimizer)
            self._state.alive.copy_(alive)
            if optimizer is not None:
                self._erase_moments(optimizer)

    def _check_wholeness(self, optimizer: PruneOptimizer | None) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.keep_whole("several processes average gradients in buffers of the old sizes")
        elif optimizer is not None and (obstacle := optimizer.obstacle()):
            self.keep_whole(obstacle)

    def keep_whole(self, reason: str) -> None:
        """From now on only mask units that go: the same course of training, without the gain in speed."""
        if self.kept_whole is None:
            warnings.warn(f"units that go stay in the model as zeros until the run ends: {reason}.", stacklevel=2)
        self.kept_whole = reason

    def _exact(self, alive: Plan) -> Plan:
        """`alive`, where cutting changes nothing; statistics and attention scales would follow the new widths."""
        groups = self.graph.groups
        whole = {name for name in alive if groups[name].normalised or groups[name].role == "head_width"}
        return {name: torch.ones_like(keep) if name in whole else keep for name, keep in alive.items()}

    @contextmanager
    def _suspended_gates(self) -> Iterator[None]:
        for gate in self.gates:
            gate.suspend(self.model)
        try:
            yield
        finally:
            for gate in self.gates:
                gate.insert(self.model)

    def _resize(self, present: Plan, optimizer: PruneOptimizer | None) -> None:
        """Give the model, whose gates are suspended, the units `present`; moments that `optimizer` has follow."""
        before = {name: keep.clone() for name, keep in self._present.items()}
        shapes = {name: (each, tuple(each.shape)) for name, each in self.model.named_parameters()}
        widen(self.model, self.graph, before)
        try:
            shrink(self.model, self.graph, present)
        except BaseException:
            narrow(self.model, self.graph, before)
            raise
        self._note(present)
        if optimizer is not None:
            old, new = kept_entries(self.graph, before), kept_entries(self.graph, present)
            for name in new.keys() & shapes.keys():
                optimizer.slice(*shapes[name], _places(old.get(name), new[name]))

    def _note(self, present: Plan) -> None:
        """The model has the units `present` now."""
        self._state.present.copy_(torch.cat([present[each.name] for each in self.structures]))
        device, entries = self._state.present.device, kept_entries(self.graph, present)
        tensors = {name: [indices.to(device) for indices in each] for name, each in entries.items()}
        for structure in self.structures:
            keep = present[structure.name]
            structure.left.units = None if keep.all() else keep.nonzero().flatten()
            structure.left.tensors = tensors

    def _erase_moments(self, optimizer: PruneOptimizer) -> None:
        """Units that are gone but still in the tensors must not be moved by what they moved before."""
        alive, parameters = self.alive, dict(self.model.named_parameters())
        for structure in self.structures:
            for name in structure.tensors:
                optimizer.erase(parameters[name], structure.expand(alive[structure.name], name))

    def _follow(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Before weights are loaded into the model, give it the widths that these were saved with."""
        saved, now = state_dict.get(f"{prefix}{STATE}.present"), self._state.present
        if module is not self.model or saved is None or saved.shape != now.shape:
            return  # a copy of the model, or weights of another run, of which loading will complain
        present = self._by_group(saved.to(now.device))
        with self._suspended_gates():
            widen(self.model, self.graph, self._present)
            narrow(self.model, self.graph, present)
            self._note(present)

    def finish(self, model: nn.Module) -> None:
        """Take the state out of `model`, whose gates are folded, and give it all units again, zero where they are gone.

        model: the one under way, or a copy of it.
        """
        if not hasattr(model, STATE):
            return  # finished before, by a `finalize` that could not go on
        widen(model, self.graph, self._present)
        delattr(model, STATE)
        if model is self.model:
            self._hook.remove()


def narrowing_of(model: nn.Module, graph: LazyGraph, recipe: Recipe) -> Narrowing | None:
    """What can cut units out of `model` during the run, where every gate allows it.

    Raises:
        PruneError: the recipe wants to cut, and some gate does not allow it.
    """
    structures = [each for each in recipe.structures if isinstance(each, GroupUnits)]
    gates = [gate for gate in recipe.gates if isinstance(gate, ShrinkableGate)]
    if structures and len(gates) == len(recipe.gates):
        return Narrowing(model, graph.traced, structures, gates)
    if recipe.shrink_at:
        raise PruneError(
            f"the recipe wants to cut units at {list(recipe.shrink_at)} of the run, but not all of its gates are masks "
            "over dimension groups."
        )
    return None


def _places(old: Sequence[Tensor] | None, new: Sequence[Tensor]) -> list[Tensor]:
    """Where the entries `new` are among the entries `old` (all, where there is none) of each dimension."""
    return list(new) if old is None else [torch.searchsorted(a, b) for a, b in zip(old, new, strict=True)]
