"""The layers that write a group, the norms behind them, and whether units that they keep silent leave a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.graph.constants import norm_behind
from hf_prune.graph.fold import dead_units
from hf_prune.graph.graph import Graph
from hf_prune.types import Group, Member

LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Writer:
    """A layer whose outputs are a group's units, and the batch norm that alone reads them, if there is one."""

    layer: str
    dim: int
    """Dimension of the weight that counts its outputs."""
    norm: str | None

    @property
    def host(self) -> str:
        """The module whose output is the group as others see it: the norm, else the layer."""
        return self.norm or self.layer


def writers(model: nn.Module, graph: Graph, group: Group) -> tuple[Writer, ...]:
    """Every dense layer that writes `group`; depthwise convolutions, which hand it on, do not count.

    Empty where some writer's outputs are not the group alone, one index a unit, or the layer or norm does more than
    torch's own class: heads, concatenations, embeddings, grouped convolutions, weights that are used twice.
    """
    dense = [member for member in _written(model, group) if not _is_depthwise(model, member)]
    return _writers(model, graph, dense, group.size)


def carriers(model: nn.Module, graph: Graph, group: Group) -> tuple[Writer, ...]:
    """Every depthwise convolution that hands `group` on; empty like `writers`."""
    depthwise = [member for member in _written(model, group) if _is_depthwise(model, member)]
    return _writers(model, graph, depthwise, group.size)


def _written(model: nn.Module, group: Group) -> list[Member]:
    """Weights with more than one dimension whose outputs have the group."""
    tensors = dict(model.named_parameters())
    known = [member for member in group.members if not member.reads and member.tensor in tensors]
    return [member for member in known if tensors[member.tensor].ndim > 1]


def _is_depthwise(model: nn.Module, member: Member) -> bool:
    groups, shape = getattr(_layer(model, member), "groups", 1), model.get_parameter(member.tensor).shape
    return bool(groups == shape[0] > 1 == shape[1])


def _layer(model: nn.Module, member: Member) -> nn.Module:
    return model.get_submodule(member.tensor.rpartition(".")[0])


def _writers(model: nn.Module, graph: Graph, members: Sequence[Member], size: int) -> tuple[Writer, ...]:
    found: list[Writer] = []
    for member in members:
        layer, shape = _layer(model, member), model.get_parameter(member.tensor).shape
        alone = member.outer == member.inner == 1 and shape[member.dim] == size
        whole = getattr(layer, "groups", 1) == 1 or _is_depthwise(model, member)
        if not (alone and whole and _is_plain(layer, LAYERS)):
            return ()
        norm = _norm_behind(model, graph, member.tensor)
        if norm is None:
            return ()
        found.append(Writer(member.tensor.rpartition(".")[0], member.dim, norm or None))
    return tuple(found)


def _is_plain(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether the module computes what one of `kinds` does; a subclass may have a forward of its own."""
    return any(type(module).forward is kind.forward for kind in kinds)


def _norm_behind(model: nn.Module, graph: Graph, weight: str) -> str | None:
    """Path of the batch norm that alone reads what `weight` gives; "" for none, None where it cannot be told."""
    trace = graph.flow.trace
    uses = [use for node, name in trace.tensors.items() if name == weight for use in node.users]
    if len(uses) != 1:
        return None
    norm = norm_behind(uses[0])
    if norm is None:
        return ""
    mean = trace.tensors.get(cast(Any, norm.args[3]))
    path = mean.rpartition(".")[0] if mean is not None else ""
    return path if path and _is_plain(model.get_submodule(path), NORMS) else None


class Silence:
    """Tells for which groups a silent unit can go: what it still adds further on is nothing, or moves into a bias.

    Works on a copy of the model with offsets that are all different from zero, so that a constant which happens to be
    zero before training is not taken for none.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model, self.graph = copy.deepcopy(model), graph
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        for parameter in self.model.parameters():
            if parameter.ndim == 1:
                parameter.data = torch.linspace(1.0, 2.0, len(parameter)).to(parameter)

    def leaves_no_trace(self, group: str, written_by: Sequence[Writer]) -> bool:
        """Whether removing units of `group` is exact once every writer gives zero for them."""
        return self._dead(group, [tensor for writer in written_by for tensor in self._output_of(writer)])

    def constants_move(self, group: str, written_by: Sequence[Writer]) -> bool:
        """Whether it is exact once every writer gives some constant for them: whether readers can take it over."""
        return self._dead(group, [self.model.get_submodule(writer.layer).weight for writer in written_by])

    def _dead(self, group: str, tensors: Sequence[Any]) -> bool:
        """Whether all units of `group` can go when `tensors` are zero."""
        saved = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = torch.zeros_like(tensor.data)
        keep = dead_units(self.model, self.graph).get(group)
        for tensor, data in zip(tensors, saved, strict=True):
            tensor.data = data
        return keep is not None and int(keep.sum()) == 1  # one of all dead units stays

    def _output_of(self, writer: Writer) -> Iterator[Tensor]:
        for path in {writer.layer, writer.host}:
            yield from self.model.get_submodule(path).parameters()
