"""The algebra against numbers: whatever is viewed, cut and joined, the kept indices say the same on both sides."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_prune.graph.axes import Dim, flat, fresh, is_frozen, leaves, size
from hf_prune.graph.dims import concatenate, cut, regroup, unify
from hf_prune.graph.groups import occurrences, unit_indices
from hf_prune.graph.kept import Kept, kept_indices

FACTORS = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def random_kept(dims: list[Dim], seed: int) -> Kept:
    """Some units of every free leaf of `dims`."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for leaf in dict.fromkeys(leaf for dim in dims for leaf in leaves(dim)):
        if not leaf.frozen:
            count = int(torch.randint(1, leaf.size + 1, (), generator=generator))
            kept[leaf] = torch.randperm(leaf.size, generator=generator)[:count].sort().values
    return kept


def select(tensor: Tensor, dims: list[Dim], kept: Kept) -> list[int]:
    for place, dim in enumerate(dims):
        tensor = tensor.index_select(place, kept_indices(dim, kept))
    return tensor.flatten().tolist()


@settings(deadline=None)
@given(old=FACTORS, new=FACTORS, seed=st.integers(0, 99))
def test_views_keep_the_same_elements(old: list[int], new: list[int], seed: int) -> None:
    rest, over = divmod(prod(old), prod(new))
    if over or not rest:
        return
    before = [fresh(count) for count in old]
    after = regroup(before, [*new, rest])
    assert [size(dim) for dim in after] == [*new, rest]
    kept = random_kept([*before, *after], seed)
    numbers = torch.arange(prod(old))
    assert select(numbers.view(old), before, kept) == select(numbers.view(*new, rest), after, kept)


@settings(deadline=None)
@given(
    parts=FACTORS,
    borders=st.lists(st.integers(0, 20), max_size=3),
    tail=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_cuts_and_concatenations_keep_the_same_elements(
    parts: list[int], borders: list[int], tail: int, seed: int
) -> None:
    inner = fresh(tail)
    dims = [fresh(count) + inner for count in parts]
    whole = rest = concatenate(dims)
    pieces = []
    for border in borders:
        piece, rest = cut(rest, min(border, size(rest)))
        pieces.append(piece)
    pieces.append(rest)
    kept = random_kept([*dims, whole, *pieces], seed)
    numbers = torch.arange(size(whole))
    joined = [
        index
        for piece, part in zip(pieces, numbers.split([size(p) for p in pieces]), strict=True)
        for index in select(part, [piece], kept)
    ]
    assert select(numbers, [whole], kept) == joined
    assert select(numbers, [concatenate(dims)], kept) == joined


@settings(deadline=None)
@given(left=FACTORS, right=FACTORS, seed=st.integers(0, 99))
def test_unified_dims_keep_the_same_indices(left: list[int], right: list[int], seed: int) -> None:
    x = tuple(axis for count in left for axis in fresh(count))
    y = tuple(axis for count in right for axis in fresh(count))
    missing = size(y) // size(x) if size(y) % size(x) == 0 else 0
    if not missing:
        return
    x += fresh(missing)
    unify(x, y)
    kept = random_kept([x, y], seed)
    assert kept_indices(x, kept).tolist() == kept_indices(y, kept).tolist()


@settings(deadline=None)
@given(parts=FACTORS, outer=st.sampled_from([1, 2, 3]), inner=st.sampled_from([1, 2, 3]))
def test_occurrences_cover_a_dim_once(parts: list[int], outer: int, inner: int) -> None:
    dim = fresh(outer) + concatenate([fresh(count) + fresh(inner) for count in parts]) + fresh(inner)
    for leaf in leaves(dim):
        places = [unit_indices(place, leaf.size) for axis, place in occurrences(dim) if axis is leaf]
        indices = torch.cat(places, 1)
        for unit in range(leaf.size):
            stay = kept_indices(dim, {leaf: torch.tensor([unit])})
            gone = indices[[other for other in range(leaf.size) if other != unit]].flatten()
            assert torch.isin(indices[unit], stay).all()
            assert len(stay) + len(gone) == size(dim)
            assert not torch.isin(gone, stay).any()


def test_incompatible_views_freeze() -> None:
    whole = fresh(24)
    regroup([whole], [6, 4])
    regroup([whole], [4, 6])
    assert is_frozen(whole)


def test_equal_parts_viewed_as_a_stack_are_one() -> None:
    query, key, value = fresh(8), fresh(8), fresh(8)
    stack, width = regroup([concatenate([query, key, value])], [3, 8])
    assert is_frozen(stack)
    assert flat(query) == flat(key) == flat(value) == flat(width)


def test_concatenations_refine_each_other() -> None:
    a, b, c, d = fresh(8), fresh(10), fresh(6), fresh(12)
    unify(concatenate([a, b]), concatenate([c, d]))
    assert [leaf.size for leaf in leaves(a)] == [6, 2]
    assert [leaf.size for leaf in leaves(d)] == [2, 10]
