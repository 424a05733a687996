"""From scores to a plan: exact counts, floors, and the same answer for equal scores on every machine and process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.config import Goal
from hf_prune.types import Plan, PruneError, Structure

Selection = Callable[[Mapping[str, Tensor], float], Plan]
"""Scores by name, share of the way to the goal in [0, 1] -> plan."""

_SAMPLE = 1 << 17
_ROUNDING = 1e-6  # of one unit: 0.1 * 1000 must count as 100 units although 1 - 0.9 is a little less than 0.1


def count_kept(kept: float, units: int) -> int:
    """How many of `units` survive at the kept fraction: rounded down, the only place where a fraction becomes a count."""
    return int(kept * units + _ROUNDING)


def kth_highest(scores: Sequence[Tensor], k: int) -> Tensor:
    """The k-th highest value (k >= 1) over all tensors together, exact.

    A strided sample brackets the value, so that only the few percent of scores inside the bracket are ordered. A sample
    that misleads costs time (everything is ordered), never exactness.
    """
    total = sum(s.numel() for s in scores)
    if total <= 4 * _SAMPLE:
        return torch.cat([s.reshape(-1) for s in scores]).topk(k).values[-1]
    stride = total // _SAMPLE
    sample = torch.cat([s.reshape(-1)[::stride] for s in scores]).sort(descending=True).values
    position, margin = k / total * len(sample), 4.0 * len(sample) ** 0.5
    high = sample[max(int(position - margin), 0)]
    low = sample[min(int(position + margin), len(sample) - 1)]
    above = sum(int((s > high).sum()) for s in scores)
    inside = torch.cat([s[(s <= high) & (s >= low)].reshape(-1) for s in scores])
    if not above < k <= above + inside.numel():
        return torch.cat([s.reshape(-1) for s in scores]).topk(k).values[-1]
    return inside.topk(k - above).values[-1]


def keep_highest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Keep masks with exactly `count` True over all tensors together; of equal scores the first ones stay."""
    total = sum(s.numel() for s in scores)
    if count >= total:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    if count <= 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    threshold = kth_highest(scores, count)
    keeps = [s > threshold for s in scores]
    missing = count - sum(int(keep.sum()) for keep in keeps)
    for score, keep in zip(scores, keeps, strict=True):
        if missing > 0:
            tied = (score == threshold).nonzero()[:missing, 0]
            keep[tied] = True
            missing -= len(tied)
    return keeps


def top_k(structures: Sequence[Structure], goal: Goal, *, scope: str, min_keep: float) -> Selection:
    """Keep the highest scores up to the goal's fraction of *weights*, over all structures or of each by itself.

    Structures may have units of different size (a neuron beside a block): a unit then costs its number of weights and
    the ranking is walked from the top until the budget is spent.
    """
    sizes = {s.name: unit_size(s) for s in structures}
    floors = {s.name: max(1, int(min_keep * s.units)) for s in structures}

    def select(scores: Mapping[str, Tensor], share: float) -> Plan:
        kept = goal.kept(share)
        _require_finite(scores)
        if scope == "per_group":
            return {n: keep_highest([s], max(floors[n], count_kept(kept, len(s))))[0] for n, s in scores.items()}
        return _global(scores, kept, sizes, floors)

    return select


def unit_size(structure: Structure) -> int:
    """Weights (not biases or norm parameters) in one unit."""
    shapes = dict(structure.shapes) if hasattr(structure, "shapes") else {structure.name: structure.shape}
    return sum(torch.Size(shape).numel() for shape in shapes.values() if len(shape) > 1) // structure.units


def _global(scores: Mapping[str, Tensor], kept: float, sizes: Mapping[str, int], floors: Mapping[str, int]) -> Plan:
    names = list(scores)
    raised: dict[str, Tensor] = dict(scores)
    for _ in range(len(names) + 1):
        plan = _rank(names, raised, kept, sizes)
        short = [n for n in names if int(plan[n].sum()) < floors[n]]
        if not short:
            break
        for name in short:
            raised[name] = scores[name].masked_fill(keep_highest([scores[name]], floors[name])[0], float("inf"))
    return plan


def _rank(names: Sequence[str], scores: Mapping[str, Tensor], kept: float, sizes: Mapping[str, int]) -> Plan:
    values = [scores[n] for n in names]
    if len({sizes[n] for n in names}) == 1:
        count = count_kept(kept, sum(len(v) for v in values))
        return dict(zip(names, keep_highest(values, count), strict=True))
    costs = torch.cat([torch.full((len(v),), sizes[n], device=v.device) for n, v in zip(names, values, strict=True)])
    order = torch.cat(values).sort(descending=True, stable=True).indices
    keep = torch.zeros_like(costs, dtype=torch.bool)
    keep[order] = costs[order].cumsum(0) <= count_kept(kept, int(costs.sum()))
    return dict(zip(names, keep.split([len(v) for v in values]), strict=True))


def _require_finite(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise PruneError(
                f"the scores of {name!r} contain NaN, so its units cannot be ranked; the run has diverged: "
                "lower the learning rates, or resume from an earlier checkpoint."
            )
