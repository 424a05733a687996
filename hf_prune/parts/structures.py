"""How weights divide into units: single elements, blocks, rows, columns, units of a dimension group, layers.

A structure knows shapes only. It regroups a weight as `(units, elems)` and broadcasts one value per unit back to the
weight's shape; scores, selection and masks are written once against these two functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.graph import spread, unit_indices
from hf_prune.graph.depth import dropped
from hf_prune.types import Group, LayerStack, Member, PruneError, Structure


@dataclass(frozen=True)
class _OneWeight:
    """What structures of a single weight share; the plan names them by the weight."""

    name: str
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The weight alone."""
        return (self.name,)

    producers = tensors


@dataclass(frozen=True)
class Elements(_OneWeight):
    """Every weight is a unit of its own."""

    @property
    def units(self) -> int:
        """One for each weight."""
        return torch.Size(self.shape).numel()

    @property
    def unit_size(self) -> int:
        """One weight."""
        return 1

    def view(self, weight: Tensor, tensor: str) -> Tensor:
        """`(weights, 1)`, row-major."""
        return weight.reshape(-1, 1)

    def expand(self, keep: Tensor, tensor: str) -> Tensor:
        """The same values in the weight's shape."""
        return keep.view(self.shape)


@dataclass(frozen=True)
class Blocks(_OneWeight):
    """Tiles of `block` = (rows, columns) of the weight seen as a matrix `(out, everything else)`, row-major."""

    block: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self._matrix
        if rows % self.block[0] or columns % self.block[1]:
            raise PruneError(
                f"weight {self.name!r} of shape {self.shape} does not divide into blocks of {self.block}; "
                f"choose a block_shape that divides ({rows}, {columns}), or add the layer to exclude."
            )

    @property
    def _matrix(self) -> tuple[int, int]:
        return self.shape[0], torch.Size(self.shape[1:]).numel()

    @property
    def _grid(self) -> tuple[int, int]:
        return self._matrix[0] // self.block[0], self._matrix[1] // self.block[1]

    @property
    def units(self) -> int:
        """One for each block, row-major."""
        return self._grid[0] * self._grid[1]

    @property
    def unit_size(self) -> int:
        """Weights in a block."""
        return self.block[0] * self.block[1]

    def view(self, weight: Tensor, tensor: str) -> Tensor:
        """`(blocks, rows * columns)`."""
        (grid_rows, grid_columns), (rows, columns) = self._grid, self.block
        tiles = weight.reshape(grid_rows, rows, grid_columns, columns)
        return tiles.permute(0, 2, 1, 3).reshape(self.units, rows * columns)

    def expand(self, keep: Tensor, tensor: str) -> Tensor:
        """Each value over its block."""
        (grid_rows, grid_columns), (rows, columns) = self._grid, self.block
        tiles = keep.view(grid_rows, 1, grid_columns, 1).expand(grid_rows, rows, grid_columns, columns)
        return tiles.reshape(self.shape)


@dataclass(frozen=True)
class Slices(_OneWeight):
    """Whole slices along dimension `dim`: rows (one output each) or columns (one input each)."""

    dim: int

    @property
    def units(self) -> int:
        """The size of dimension `dim`."""
        return self.shape[self.dim]

    @property
    def unit_size(self) -> int:
        """Weights in a slice."""
        return torch.Size(self.shape).numel() // self.units

    def view(self, weight: Tensor, tensor: str) -> Tensor:
        """`(slices, everything else)`."""
        return weight.movedim(self.dim, 0).reshape(self.units, -1)

    def expand(self, keep: Tensor, tensor: str) -> Tensor:
        """Each value over its slice."""
        return keep.view([-1 if d == self.dim else 1 for d in range(len(self.shape))]).expand(self.shape)


@dataclass
class Left:
    """What a group and its tensors still have once units were cut out while the run goes on; empty before that."""

    units: Tensor | None = None
    """Indices of the units left."""
    tensors: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """Tensor that lost entries, to any group -> indices of each of its dimensions that are left."""


@dataclass(frozen=True)
class GroupUnits:
    """The units of a dimension group, tied over all its members: an FFN neuron is a row, a bias entry and a column.

    Units are those of the model as it was attached, also when some were cut out since (`Pruner.shrink_now`): scores,
    plans and reports need not know. `view` gives zeros for what is gone, `expand` fits the tensors as they are.
    """

    group: Group
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    left: Left = field(default_factory=Left, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The group's."""
        return self.group.name

    @property
    def units(self) -> int:
        """The group's size."""
        return self.group.size

    @cached_property
    def unit_size(self) -> int:
        """An equal share of the weights that belong to units, over all members, without biases and norm parameters."""
        none = torch.zeros(self.units, dtype=torch.bool)
        whole = GroupUnits(self.group, self.shapes)
        weights = [whole.expand(none, name) for name, shape in self.shapes if len(shape) > 1]
        return sum(mask.numel() - int(mask.count_nonzero()) for mask in weights) // self.units

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every parameter that the group occurs in."""
        return tuple(name for name, _ in self.shapes)

    @property
    def producers(self) -> tuple[str, ...]:
        """Tensors whose rows, filters or heads the units are; the others read them."""
        written = {member.tensor for member in self.group.members if not member.reads}
        return tuple(name for name in self.tensors if name in written)

    def view(self, weight: Tensor, tensor: str) -> Tensor:
        """What each unit has in `tensor`, its occurrences side by side."""
        if tensor in self.left.tensors:
            weight = spread(weight, self.left.tensors[tensor], dict(self.shapes)[tensor])
        return torch.cat([self._member_view(weight, member) for member in self._members(tensor)], dim=1)

    def expand(self, keep: Tensor, tensor: str) -> Tensor:
        """Each value wherever its unit occurs; an entry that belongs to two units stays while both do."""
        shape = dict(self.shapes)[tensor]
        masks = [self._member_mask(keep, member, shape) for member in self._members(tensor)]
        return reduce(torch.mul, masks)

    def spread(self, values: Tensor) -> Tensor:
        """One value for each unit left, `(units left, ...)`, as one for each unit, `(units, ...)`: 0 for those gone."""
        if self.left.units is None:
            return values
        return values.new_zeros(self.units, *values.shape[1:]).index_copy_(0, self.left.units, values)

    def _fills(self, member: Member, size: int) -> bool:
        """Whether the group has the dimension of that size to itself, so that reshaping it is enough."""
        return member.outer * self.units * member.inner == size

    def _members(self, tensor: str) -> list[Member]:
        return [member for member in self.group.members if member.tensor == tensor]

    def _member_view(self, weight: Tensor, member: Member) -> Tensor:
        along = weight.movedim(member.dim, 0)
        if self._fills(member, len(along)):
            own = along.reshape(member.outer, self.units, member.inner, -1).movedim(1, 0)
        else:
            own = along[unit_indices(member, self.units)]
        return own.reshape(self.units, -1)

    def _member_mask(self, keep: Tensor, member: Member, shape: tuple[int, ...]) -> Tensor:
        if self._fills(member, shape[member.dim]):
            along = keep.view(1, -1, 1).expand(member.outer, self.units, member.inner).reshape(-1)
        else:
            indices = unit_indices(member, self.units).to(keep.device)
            own = keep[:, None].expand_as(indices).flatten()
            along = keep.new_ones(shape[member.dim]).index_copy(0, indices.flatten(), own)
        left = self.left.tensors.get(member.tensor)
        if left is not None:
            along, shape = along[left[member.dim]], tuple(map(len, left))
        return along.view([-1 if d == member.dim else 1 for d in range(len(shape))]).expand(shape)


@dataclass(frozen=True)
class LayerUnits:
    """Whole layers of a stack, each with all of its parameters."""

    stack: LayerStack
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        """The stack's."""
        return self.stack.name

    @property
    def units(self) -> int:
        """How many of the stack's layers can go."""
        return len(self.stack.layers)

    @property
    def unit_size(self) -> int:
        """An equal share of the layers' weights, without biases and norm parameters."""
        return sum(self.weights) // self.units

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """How many weights each layer has."""
        shapes = dict(self.shapes)
        sizes = ([shapes[name] for name in layer.parameters] for layer in self.stack.layers)
        return tuple(sum(math.prod(shape) for shape in each if len(shape) > 1) for each in sizes)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every parameter of the layers."""
        return tuple(name for name, _ in self.shapes)

    producers = tensors

    @cached_property
    def _owner(self) -> dict[str, int]:
        return {name: unit for unit, layer in enumerate(self.stack.layers) for name in layer.parameters}

    def view(self, weight: Tensor, tensor: str) -> Tensor:
        """`weight` in the row of its layer, zeros in all others."""
        rows = weight.new_zeros(self.units, weight.numel())
        return rows.index_copy(0, torch.tensor([self._owner[tensor]], device=weight.device), weight.reshape(1, -1))

    def expand(self, keep: Tensor, tensor: str) -> Tensor:
        """The value of the tensor's layer, everywhere."""
        return keep[self._owner[tensor]].expand(dict(self.shapes)[tensor])

    def remaining(self, keep: Tensor) -> list[int]:
        """Places in the stack of all layers that stay."""
        gone = {layer.index for layer in dropped(self.stack, keep)}
        return [index for index in range(self.stack.size) if index not in gone]


def output_dim(module: nn.Module) -> int:
    """Which dimension of the module's weight counts its outputs."""
    return 1 if isinstance(module, Conv1D) else 0


def element_structures(weights: Mapping[str, nn.Module]) -> list[Structure]:
    """Every weight of each layer is a unit."""
    return [Elements(name, _weight_shape(module)) for name, module in weights.items()]


def block_structures(weights: Mapping[str, nn.Module], block: tuple[int, int]) -> list[Structure]:
    """Every block of `block` = (rows, columns) of each layer is a unit."""
    return [Blocks(name, _weight_shape(module), block) for name, module in weights.items()]


def row_structures(weights: Mapping[str, nn.Module]) -> list[Structure]:
    """Every output of each layer is a unit: its weights, without its bias."""
    return [Slices(name, _weight_shape(module), output_dim(module)) for name, module in weights.items()]


def column_structures(weights: Mapping[str, nn.Module]) -> list[Structure]:
    """Every input of each layer is a unit."""
    return [Slices(name, _weight_shape(module), 1 - output_dim(module)) for name, module in weights.items()]


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(cast(Tensor, module.weight).shape)


def neuron_structures(
    model: nn.Module, groups: Mapping[str, Group], weights: Mapping[str, nn.Module]
) -> list[Structure]:
    """One structure per hidden width between two of `weights`: the FFN neurons of a transformer.

    Raises:
        PruneError: the model has no such width.
    """
    bound = [group_structure(group, model) for group in groups.values() if group.frozen is None]
    found: list[Structure] = [structure for structure in bound if _is_hidden_width(structure, weights)]
    if not found:
        raise PruneError(
            f"no FFN width was found between the {len(weights)} chosen layers of {type(model).__name__}; "
            "structure 'neuron' needs pairs of layers of which the second reads the first through pointwise operations."
        )
    return found


def _is_hidden_width(structure: GroupUnits, weights: Mapping[str, nn.Module]) -> bool:
    """Rows of chosen layers and columns of chosen layers and of no others, one each a unit, under no statistics."""
    matrices = {name for name, shape in structure.shapes if len(shape) > 1}
    members = structure.group.members
    single = all(member.outer == member.inner == 1 for member in members)
    both_sides = {member.reads for member in members if member.tensor in matrices} == {True, False}
    return single and both_sides and not structure.group.normalised and matrices <= weights.keys()


def layer_structure(stack: LayerStack, model: nn.Module) -> LayerUnits:
    """`stack` bound to the shapes that its parameters have in `model`."""
    tensors = dict(model.named_parameters())
    names = [name for layer in stack.layers for name in layer.parameters]
    return LayerUnits(stack, tuple((name, tuple(tensors[name].shape)) for name in names))


def group_structure(group: Group, model: nn.Module) -> GroupUnits:
    """`group` bound to the shapes that its members have in `model`."""
    tensors = dict(model.named_parameters())
    names = dict.fromkeys(member.tensor for member in group.members if member.tensor in tensors)
    return GroupUnits(group, tuple((name, tuple(tensors[name].shape)) for name in names))
