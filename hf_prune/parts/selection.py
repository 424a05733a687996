"""From scores to a plan: exact counts, floors, and the same answer for equal scores on every machine and process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_prune.config import Goal
from hf_prune.parts.gates import Gate
from hf_prune.types import Plan, PruneError, Structure

Selection = Callable[[Mapping[str, Tensor], float], Plan]
"""Scores by name, share of the way to the goal in [0, 1] -> plan."""

_SAMPLE = 1 << 17
_ROUNDING = 1e-6  # of one unit: 0.1 * 1000 must count as 100 units although 1 - 0.9 is a little less than 0.1


def count_kept(kept: float, units: int) -> int:
    """How many of `units` survive at the kept fraction, rounded down: the one place where it becomes a count."""
    return int(kept * units + _ROUNDING)


def floor_count(min_keep: float, units: int) -> int:
    """How many of `units` stay whatever the goal: the fraction `min_keep` of them, and one at least."""
    return max(1, int(min_keep * units))


def select_among(plan: Plan, selection: Selection, scores: Mapping[str, Tensor], share: float) -> Plan:
    """What `selection` keeps of the units that `plan` keeps: what is gone stays gone, whatever its score is now."""
    left = {name: score.masked_fill(~plan[name].to(score.device), -torch.inf) for name, score in scores.items()}
    return {name: keep & plan[name].to(keep.device) for name, keep in selection(left, share).items()}


def lasting(gates: Sequence[Gate], selection: Selection) -> Selection:
    """`selection` among what the gates still keep."""
    return lambda scores, share: select_among({gate.name: gate.keep() for gate in gates}, selection, scores, share)


def keep_floors(plan: Plan, scores: Mapping[str, Tensor], floors: Mapping[str, int]) -> Plan:
    """`plan`, where the best units of each structure stay up to its floor."""
    return {name: keep | keep_highest([scores[name]], floors[name])[0] for name, keep in plan.items()}


def drop_lowest(scores: Mapping[str, Tensor], count: int, floors: Mapping[str, int]) -> Plan:
    """Drop the `count` lowest of all structures together; a floor's best units take nothing from the count."""
    guarded = [
        score.masked_fill(keep_highest([score], floors[name])[0], float("inf")) for name, score in scores.items()
    ]
    return dict(zip(scores, keep_highest(guarded, sum(map(len, guarded)) - count), strict=True))


def dropped(plan: Plan) -> int:
    """How many units `plan` removes."""
    return sum(int((~keep).sum()) for keep in plan.values())


def keep_highest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Keep masks with exactly `count` True over all (1-D) tensors together; of equal scores the first stay."""
    total = sum(s.numel() for s in scores)
    if count >= total:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    if count <= 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    threshold, above, tied = _threshold(scores, count)
    missing = count - above
    if missing == tied:
        return [s >= threshold for s in scores]
    keeps = [s > threshold for s in scores]
    for score, keep in zip(scores, keeps, strict=True):
        first = (score == threshold).nonzero()[:missing, 0]
        keep[first] = True
        missing -= len(first)
    return keeps


def _threshold(scores: Sequence[Tensor], k: int) -> tuple[Tensor, int, int]:
    """The k-th highest value over all tensors, how many values are above it, and how many equal it; exact.

    A strided sample brackets the value, so that only the few scores inside the bracket are ordered. A sample that
    misleads costs time (everything is ordered), never exactness.
    """
    total, above, inside = sum(s.numel() for s in scores), 0, None
    if total > 4 * _SAMPLE:
        low, high = _bracket(scores, k, total)
        over = [s > high for s in scores]
        above = sum(int(mask.count_nonzero()) for mask in over)
        inside = torch.cat([_pick(s, (s >= low) ^ mask) for s, mask in zip(scores, over, strict=True)])
    if inside is None or not above < k <= above + len(inside):
        above, inside = 0, torch.cat(list(scores))
    threshold = inside.topk(k - above).values[-1]
    return threshold, above + int((inside > threshold).sum()), int((inside == threshold).sum())


def _bracket(scores: Sequence[Tensor], k: int, total: int) -> tuple[Tensor, Tensor]:
    """Two values between which the k-th highest lies, four standard errors of the sampled rank to each side."""
    sample = torch.cat([s[:: total // _SAMPLE] for s in scores]).sort(descending=True).values
    position, margin = k / total * len(sample), 4.0 * len(sample) ** 0.5
    first, last = max(int(position - margin), 0), min(int(position + margin), len(sample) - 1)
    return sample[last], sample[first]


def _pick(values: Tensor, chosen: Tensor) -> Tensor:
    """`values[chosen]` for few chosen values: eight flags at a time are looked at as one integer, which is faster."""
    whole = len(values) // 8 * 8
    words = chosen[:whole].view(torch.int64).nonzero()[:, 0]
    near, flags = values[:whole].reshape(-1, 8)[words], chosen[:whole].view(-1, 8)[words]
    return torch.cat([near[flags], values[whole:][chosen[whole:]]])


def top_k(structures: Sequence[Structure], goal: Goal, *, scope: str, min_keep: float) -> Selection:
    """Keep the highest scores up to the goal's fraction of *weights*, over all structures or of each by itself.

    Structures may have units of different size (a neuron beside a block): a unit then costs its number of weights and
    the ranking is walked from the top until the budget is spent.
    """
    sizes = {s.name: s.unit_size for s in structures}
    floors = {s.name: floor_count(min_keep, s.units) for s in structures}

    def select(scores: Mapping[str, Tensor], share: float) -> Plan:
        kept = goal.kept(share)
        _require_finite(scores)
        if scope == "per_group":
            return {n: keep_highest([s], max(floors[n], count_kept(kept, len(s))))[0] for n, s in scores.items()}
        return _global(scores, kept, sizes, floors)

    return select


def top_units(structures: Sequence[Structure], goal: Goal, *, scope: str, min_keep: float) -> Selection:
    """Keep the highest scores up to the goal's fraction of *units*, over all structures or of each by itself.

    k of C units stay in the end, the goal's fraction of C to the nearest, and `k + floor((C - k) (1 - share))` on the
    way: counted from totals, so that no rounding adds up.
    """
    floors = {s.name: floor_count(min_keep, s.units) for s in structures}

    def count(units: int, share: float) -> int:
        final = int(goal.kept(1.0) * units + 0.5)
        return final + count_kept(1.0 - share, units - final)

    def select(scores: Mapping[str, Tensor], share: float) -> Plan:
        _require_finite(scores)
        if scope == "per_group":
            return {n: keep_highest([s], max(floors[n], count(len(s), share)))[0] for n, s in scores.items()}
        raised = {n: s.masked_fill(keep_highest([s], floors[n])[0], float("inf")) for n, s in scores.items()}
        wanted = max(count(_total(scores), share), sum(floors.values()))
        return dict(zip(raised, keep_highest(list(raised.values()), wanted), strict=True))

    return select


def _total(scores: Mapping[str, Tensor]) -> int:
    return sum(len(score) for score in scores.values())


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
    else:
        # The floors alone cost more than the goal leaves: they win.
        return keep_floors(plan, scores, floors)
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
        if bool(score.sum().isnan()):  # one pass without a copy; +inf and -inf together do not occur in scores
            raise PruneError(
                f"the scores of {name!r} contain NaN, so its units cannot be ranked; the run has diverged: "
                "lower the learning rates, or resume from an earlier checkpoint."
            )
