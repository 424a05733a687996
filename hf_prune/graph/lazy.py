"""The graph of a model, traced when it is first looked at: methods that look at weights alone never pay for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from torch import Tensor, nn

from hf_prune.graph.graph import Graph, trace
from hf_prune.types import Group, LayerStack, PruneError

ExampleInputs = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None


class LazyGraph:
    """The dimension groups of a model, traced when a method first asks for them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self._model, self._example_inputs = model, example_inputs

    @cached_property
    def traced(self) -> Graph:
        """The graph itself."""
        given = self._example_inputs() if callable(self._example_inputs) else self._example_inputs
        inputs = given or getattr(self._model, "dummy_inputs", None)
        if inputs is None:
            raise PruneError("this method looks at the model's graph; give Pruner example_inputs for one forward pass.")
        return trace(self._model, inputs)

    @property
    def groups(self) -> Mapping[str, Group]:
        """The groups that can be pruned."""
        return self.traced.groups

    @property
    def stacks(self) -> Mapping[str, LayerStack]:
        """The lists of layers some of which can go whole."""
        return self.traced.stacks

    @property
    def frozen(self) -> dict[str, str]:
        """Why each other group must keep its size."""
        return {name: str(group.frozen) for name, group in self.traced.frozen.items()}
