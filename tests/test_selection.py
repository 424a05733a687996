"""Selection: exact counts, ties, floors, units of unequal size, and the sampled threshold against a full sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune import PruneError
from hf_prune.config import Goal
from hf_prune.parts import selection
from hf_prune.parts.structures import Blocks, Elements, Slices


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    values=st.sampled_from(["normal", "ties", "constant"]),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_keeps_exactly_the_highest(sizes: list[int], values: str, fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(n, generator=generator) for n in sizes]
    if values == "ties":
        scores = [s.round() for s in scores]
    elif values == "constant":
        scores = [torch.zeros_like(s) for s in scores]
    count = int(fraction * sum(sizes))
    keep = torch.cat(selection.keep_highest(scores, count))
    order = torch.cat(scores).sort(descending=True, stable=True).indices  # stable: of equal scores the first stay
    expected = torch.zeros_like(keep)
    expected[order[:count]] = True
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("kind", ["normal", "heavy tail", "many ties", "sorted"])
@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_sampled_threshold_equals_a_full_sort(kind: str, kept: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, generator=generator) for n in (300_001, 450_000, 70_005)]
    if kind == "heavy tail":
        scores = [s**5 for s in scores]
    elif kind == "many ties":
        scores = [(s * 3).round() for s in scores]
    elif kind == "sorted":
        scores = [s.sort().values for s in scores]
    count = int(kept * 820_006)
    keep = torch.cat(selection.keep_highest(scores, count))
    expected = torch.zeros_like(keep)
    expected[torch.cat(scores).sort(descending=True, stable=True).indices[:count]] = True
    assert torch.equal(keep, expected)


def test_a_misleading_sample_costs_no_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_SAMPLE", 1000)
    scores = torch.zeros(100_000)
    scores[1::100] = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 5  # never in the strided sample
    keep = selection.keep_highest([scores], 500)[0]
    assert int(keep.sum()) == 500 and scores[keep].min() >= scores[~keep].max()


def test_floor_keeps_units_of_a_hopeless_weight() -> None:
    structures = [Elements("good", (10, 10)), Elements("bad", (10, 10))]
    select = selection.top_k(structures, Goal("final_sparsity", 0.5), scope="global", min_keep=0.05)
    plan = select({"good": torch.ones(100), "bad": -torch.arange(100.0)}, 1.0)
    assert plan["bad"].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert int(plan["good"].sum()) == 95


def test_floors_win_over_a_goal_that_leaves_less() -> None:
    structures = [Elements("a", (2, 5)), Elements("b", (2, 5))]
    select = selection.top_k(structures, Goal("final_sparsity", 0.95), scope="global", min_keep=0.0)
    plan = select({"a": torch.arange(10.0), "b": -torch.arange(10.0)}, 1.0)
    assert plan["a"].nonzero()[:, 0].tolist() == [9] and plan["b"].nonzero()[:, 0].tolist() == [0]


def test_scores_need_not_be_contiguous() -> None:
    scores = torch.randn(600_000, 2, generator=torch.Generator().manual_seed(0))[:, 0]
    assert torch.equal(selection.keep_highest([scores], 1000)[0], selection.keep_highest([scores.clone()], 1000)[0])


def test_units_of_unequal_size_are_paid_by_their_weights() -> None:
    structures = [Blocks("blocks", (4, 4), (2, 2)), Slices("rows", (4, 8), 0)]
    select = selection.top_k(structures, Goal("final_sparsity", 0.5), scope="global", min_keep=0.0)
    plan = select({"blocks": torch.tensor([4.0, 3.0, 2.0, 1.0]), "rows": torch.tensor([9.0, 8.0, 0.5, 0.4])}, 1.0)
    kept = 4 * int(plan["blocks"].sum()) + 8 * int(plan["rows"].sum())
    assert plan["rows"].tolist() == [True, True, False, False] and plan["blocks"].tolist() == [True, True, False, False]
    assert kept == 24  # of 48 weights


def test_nothing_is_removed_before_the_schedule_begins() -> None:
    select = selection.top_k([Elements("w", (5, 5))], Goal("final_sparsity", 0.9), scope="global", min_keep=0.0)
    assert select({"w": torch.randn(25)}, 0.0)["w"].all()


def test_nan_scores_are_refused() -> None:
    select = selection.top_k([Elements("w", (2, 2))], Goal("final_sparsity", 0.5), scope="global", min_keep=0.0)
    with pytest.raises(PruneError, match="NaN"):
        select({"w": torch.tensor([1.0, float("nan"), 0.0, 0.0])}, 1.0)
