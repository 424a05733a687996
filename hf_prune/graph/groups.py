"""Axes as groups: which tensors each free axis occurs in, what it is, and a name that stays the same between runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from hf_prune.graph.axes import Axis, Cat, Dim, flat, size
from hf_prune.graph.flow import Flow
from hf_prune.types import Group, Member

ROLES = ("heads", "head_width", "stream", "channels")


def occurrences(dim: Dim) -> Iterator[tuple[Axis, Member]]:
    """Every leaf of `dim` with its place, as a `Member` without tensor."""
    factors = flat(dim)
    for position, axis in enumerate(factors):
        outer, inner = size(factors[:position]), size(factors[position + 1 :])
        if not isinstance(axis.form, Cat):
            yield axis, Member("", 0, outer, inner, pitch=axis.size * inner)
            continue
        start = 0
        for part in axis.form.parts:
            for leaf, place in occurrences(part):
                yield from ((leaf, each) for each in _inside(place, start, outer, axis.size * inner, inner))
            start += size(part)


def _inside(place: Member, start: int, outer: int, pitch: int, inner: int) -> Iterator[Member]:
    """`place` as seen from a dim that repeats its dim `outer` times every `pitch` indices, from `start` on."""
    own = place.pitch or 0  # `occurrences` always gives one
    moved = replace(place, start=(start + place.start) * inner, pitch=own * inner, inner=place.inner * inner)
    if outer == 1:
        yield moved
    elif place.outer == 1:
        yield replace(moved, outer=outer, pitch=pitch)
    else:
        for copy in range(outer):
            yield replace(moved, start=moved.start + copy * pitch)


def unit_indices(member: Member, units: int) -> Tensor:
    """Indices of each unit in its dimension, shape `(units, outer * inner)`."""
    pitch = units * member.inner if member.pitch is None else member.pitch
    outer = torch.arange(member.outer) * pitch + member.start
    unit = torch.arange(units) * member.inner
    return (unit[:, None, None] + outer[:, None] + torch.arange(member.inner)).flatten(1)


def find_groups(flow: Flow, parameters: set[str]) -> tuple[dict[str, Group], dict[str, Group], dict[str, Axis]]:
    """Free groups, frozen groups, and the axis of each free group, all by name.

    An axis that only buffers have is no group: nothing is gained by cutting it.
    """
    matrices = {name for name in parameters if len(flow.tensors[name]) > 1}
    members: dict[Axis, list[Member]] = {}
    for tensor, shape in flow.tensors.items():
        for position, dim in enumerate(shape):
            for axis, place in occurrences(dim):
                reads = (tensor, position) in flow.reads
                if axis.size:  # register tokens, say, of which there are none
                    members.setdefault(axis, []).append(replace(place, tensor=tensor, dim=position, reads=reads))
    owned = {axis: found for axis, found in members.items() if any(member.tensor in parameters for member in found)}
    frozen = {group.name: group for axis, found in owned.items() if axis.frozen for group in [_frozen(axis, found)]}
    taken: Counter[str] = Counter()
    free, axes = {}, {}
    for axis, found in owned.items():
        if axis.frozen is None:
            group = _free(axis, found, matrices, taken)
            free[group.name], axes[group.name] = group, axis
    return free, frozen, axes


def _frozen(axis: Axis, members: Sequence[Member]) -> Group:
    first = members[0]
    return Group(f"{first.tensor}[{first.dim}]", axis.size, tuple(members), axis.normalised, axis.frozen)


def _free(axis: Axis, members: Sequence[Member], matrices: set[str], taken: Counter[str]) -> Group:
    role = next((role for role in ROLES if role in axis.marks), "neurons")
    writers = [member for member in members if not member.reads] or members
    name = _name(role, [member for member in writers if member.tensor in matrices] or writers)
    taken[name] += 1
    if taken[name] > 1:
        name = f"{name}#{taken[name]}"
    return Group(name, axis.size, tuple(members), axis.normalised, role=role)


def _name(role: str, writers: Sequence[Member]) -> str:
    """The module that produces the group; with its role where the group is only a part of what the module produces.

    Heads and streams, which several modules produce, are called by the beginning that the paths of these share.
    """
    paths = list(dict.fromkeys(member.tensor.rpartition(".")[0] for member in writers))
    if len(paths) > 1 and role in ("heads", "head_width", "stream"):
        return ".".join([*_common([path.split(".") for path in paths]), role])
    whole = writers[0].outer == writers[0].inner == 1
    return paths[0] if whole and paths[0] else ".".join([paths[0], role]).lstrip(".")


def _common(paths: Sequence[list[str]]) -> list[str]:
    """What all paths begin with."""
    columns = zip(*paths, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
