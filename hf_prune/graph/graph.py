"""The dimension groups of a model, and what any plan for them costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_prune.graph.axes import Axis, freeze
from hf_prune.graph.depth import dropped, settle
from hf_prune.graph.example import example_inputs as default_inputs
from hf_prune.graph.flow import Flow
from hf_prune.graph.groups import find_groups
from hf_prune.graph.latency import Latency
from hf_prune.graph.prices import Price, Prices
from hf_prune.graph.scales import find_scales
from hf_prune.graph.stacks import find_stacks
from hf_prune.graph.table import CONFIG, made_buffers
from hf_prune.graph.trace import Inputs, as_arguments, record, refuse_wrapped
from hf_prune.types import Group, LayerStack, Plan


@dataclass(frozen=True, eq=False)
class Graph:
    """Groups of one model as it was when traced; after `shrink` the model needs a new trace.

    `groups` can be pruned, `frozen` cannot and say why. The other fields serve `shrink`.
    """

    groups: dict[str, Group]
    frozen: dict[str, Group]
    axes: dict[str, Axis]
    flow: Flow
    inputs: Inputs
    element_bytes: dict[str, int]
    """Parameter name -> bytes an element."""
    model: nn.Module
    """The model itself, which may have changed since."""

    @cached_property
    def latency(self) -> Latency:
        """Milliseconds of any plan on this machine; ask for it first while the model is as it was traced."""
        return Latency(self.model, self.inputs, self.flow, self.axes)

    @cached_property
    def stacks(self) -> dict[str, LayerStack]:
        """Lists of residual layers some of which can go whole; ask for them first while the model is as it was traced.

        Runs the model, once with and without each layer.
        """
        return find_stacks(self.model, self.inputs, partial(settle, self.model, self.inputs))

    def names_layers(self, plan: Plan) -> bool:
        """Whether `plan` drops whole layers of `stacks`; one that does can drop nothing else."""
        others = plan.keys() - self.groups.keys() - self.frozen.keys()
        return bool(others) and plan.keys() <= self.stacks.keys()

    def price(self, plan: Plan | None = None) -> Price:
        """What the model costs once `plan` is carried out; groups and layers that it does not name stay whole."""
        if plan and self.names_layers(plan):
            return self._price_without(plan)
        kept = {name: int(keep.sum()) for name, keep in (plan or {}).items()}
        sizes = torch.tensor([kept.get(name, group.size) for name, group in self.groups.items()])
        return Price(*self.prices.at(sizes).tolist())

    def _price_without(self, plan: Plan) -> Price:
        """Of the whole model, less the layers that `plan` drops."""
        whole = self.price()
        gone = [layer for name, keep in plan.items() for layer in dropped(self.stacks[name], keep)]
        sizes = {name: math.prod(self.flow.tensors[name].sizes) for layer in gone for name in layer.parameters}
        return Price(
            whole.multiply_adds - sum(layer.multiply_adds for layer in gone),
            whole.parameters - sum(sizes.values()),
            whole.bytes - sum(count * self.element_bytes[name] for name, count in sizes.items()),
        )

    @cached_property
    def prices(self) -> Prices:
        """Prices as functions of the sizes of `groups`, in their order."""
        tensors = [
            (tuple(axis for dim in self.flow.tensors[name] for axis in dim), width)
            for name, width in self.element_bytes.items()
        ]
        return Prices(list(self.axes.values()), self.flow.costs, tensors, _samples(self.inputs))


def trace(model: nn.Module, example_inputs: Inputs | None = None) -> Graph:
    """Find the dimension groups of `model` from one run on `example_inputs`; the model stays as it is.

    example_inputs: keyword tensors (a dict or what a tokenizer gives), or a tuple of positional ones; made from the
    config where omitted. Their sizes should differ from each other and from the model's own (batch 2, odd lengths).
    Works on frozen models and on models on the meta device.
    """
    refuse_wrapped(model)
    inputs = default_inputs(model) if example_inputs is None else as_arguments(example_inputs)
    recorded = record(model, inputs)
    flow = Flow(recorded, *find_scales(model, inputs, recorded))
    for name in sorted(flow.tensors.keys() - _stored(model)):
        for dim in flow.tensors[name]:
            freeze(dim, f"{name} has it, a tensor that checkpoints do not hold")
    for attribute, dim in flow.equations.attributes.items():
        if attribute.module == "" and attribute.name.startswith(CONFIG):
            freeze(dim, f"the model reads {attribute.name} as it runs, by which checkpoints are also built")
    parameters = dict(model.named_parameters())
    free, frozen, axes = find_groups(flow, set(parameters))
    return Graph(
        free, frozen, axes, flow, inputs, {name: each.element_size() for name, each in parameters.items()}, model
    )


def _stored(model: nn.Module) -> set[str]:
    """Names of the tensors that a loaded model has narrow; code makes others anew, at full size, when it is loaded.

    Of vectors that are made so, loading picks entries, unless code makes them again for longer texts as it runs.
    """
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in made_buffers(model)}
    changing = [
        name for name, owner in owners.items() if re.search("dynamic|longrope", str(vars(owner).get("rope_type")))
    ]
    return (set(model.state_dict()) | owners.keys()) - {*ignored, *changing}


def _samples(inputs: Inputs) -> int:
    """Batch size of the example."""
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
