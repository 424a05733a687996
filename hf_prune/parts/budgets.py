"""Selection by price: keep the highest scores such that the model costs what the goal says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hf_prune.config import Goal
from hf_prune.graph import Graph, shrink
from hf_prune.parts.selection import Selection, floor_count, keep_highest
from hf_prune.types import Plan, PruneError, Structure

PRICES: dict[str, Callable[[Graph, Plan | None], float]] = {
    "target_flops": lambda graph, plan: graph.price(plan).multiply_adds,
    "target_params": lambda graph, plan: graph.price(plan).parameters,
    "target_bytes": lambda graph, plan: graph.price(plan).bytes,
    "target_latency": lambda graph, plan: graph.latency.at(plan),
}
"""Goal -> price of a plan: multiply-adds per sample, parameters, bytes, milliseconds as estimated."""

CORRECTIONS: dict[str, Callable[[Graph, float, Callable[[float], Plan]], float]] = {
    "target_latency": lambda graph, goal, choose: graph.latency.correction(goal, choose, partial(_shrink, graph)),
}
"""Goal whose price is an estimate -> factor on the goal, found by measuring what the last plan really costs."""


def _shrink(graph: Graph, model: nn.Module, plan: Plan) -> None:
    shrink(model, graph, plan)


_PLACES = {"target_flops": 0, "target_params": 1, "target_bytes": 2}  # of each goal's price in `Prices.at`


def share_of_sizes(graph: Graph, goal: Goal, groups: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """What the model costs, as a share of the dense price, when `groups` have the sizes `(groups,)` given.

    All other groups stay whole. Differentiable: the price is a polynomial, so sizes may be expectations.
    """
    names, place = list(graph.groups), _PLACES[goal.name]
    whole = torch.tensor([float(group.size) for group in graph.groups.values()], dtype=torch.float64)
    where, dense = torch.tensor([names.index(group) for group in groups]), graph.prices.at(whole)[place]

    def share(sizes: Tensor) -> Tensor:
        at = whole.index_copy(0, where, sizes.cpu().double())  # not every device has double precision
        return graph.prices.at(at)[place] / dense

    return share


class Allowance:
    """What plans may cost on the way to `goal`; where prices are estimates, corrected once for the last plan."""

    def __init__(self, graph: Graph, goal: Goal) -> None:
        self.graph, self.goal = graph, goal
        self.dense = PRICES[goal.name](graph, None)
        self.factor: float | None = None  # known once the last plan was first chosen

    def spend(self, share: float, choose: Callable[[float], Plan]) -> Plan:
        """The plan that `choose` finds for the price allowed at `share` of the way."""
        kept = self.goal.kept(share)
        if share >= 1.0 and self.goal.name in CORRECTIONS:
            if self.factor is None:
                correct = CORRECTIONS[self.goal.name]
                self.factor = correct(self.graph, self.goal.value, lambda kept: choose(kept * self.dense))
            kept *= self.factor
        return choose(kept * self.dense)


def fit_price(
    graph: Graph, structures: Sequence[Structure], goal: Goal, *, scope: str, min_keep: float, width_multiple: int = 1
) -> Selection:
    """The most units, highest scores first, whose price is at most the goal's share of the dense price.

    Scope "global" ranks the units of all groups together; "per_group" keeps the same fraction of each. Every group
    keeps its floor; a goal below the price of all floors raises at once. Groups of at least four times `width_multiple`
    keep all their units or a multiple of it, the nearest to what they would keep without.
    """
    price = PRICES[goal.name]
    blocks = {s.name: width_multiple if s.units >= 4 * width_multiple else 1 for s in structures}
    floors = {s.name: _round_up(floor_count(min_keep, s.units), blocks[s.name], s.units) for s in structures}
    allowance = Allowance(graph, goal)
    require_reachable(goal, price(graph, floors_alone(structures, floors)) / allowance.dense)

    def select(scores: Mapping[str, Tensor], share: float) -> Plan:
        values = {name: _rank(score) for name, score in scores.items()} if scope == "per_group" else scores
        return allowance.spend(share, lambda allowed: choose(values, allowed))

    def choose(values: Mapping[str, Tensor], allowed: float) -> Plan:
        places = _places(values, floors, blocks)

        def best(count: int) -> Plan:
            return {name: place < count for name, place in places.items()}

        cheap, dear = 0, sum(len(s) for s in values.values())
        everything = best(dear)
        if price(graph, everything) <= allowed:
            return everything
        while dear - cheap > 1:
            middle = (cheap + dear) // 2
            cheap, dear = (middle, dear) if price(graph, best(middle)) <= allowed else (cheap, middle)
        return best(cheap)

    return select


def floors_alone(structures: Sequence[Structure], floors: Mapping[str, int]) -> Plan:
    """The plan that keeps only as many units of each structure as its floor says."""
    return {s.name: torch.arange(s.units) < floors[s.name] for s in structures}


def require_reachable(goal: Goal, least: float) -> None:
    """Raise where the cheapest plan, which costs the share `least` of the dense model, is dearer than the goal."""
    if least > goal.kept(1.0):
        raise PruneError(
            f"{goal.name}={goal.value} cannot be reached: with every group at its floor the model still costs "
            f"{least:.3f} of the dense one. Raise the goal, lower min_keep, or prune more layers."
        )


def _places(values: Mapping[str, Tensor], floors: Mapping[str, int], blocks: Mapping[str, int]) -> dict[str, Tensor]:
    """Place of each unit among those of all groups, the highest at 0, of equal ones the first; floors at -1.

    blocks: how many neighbours in a group's own order stay or go together, at the place of the middle one.
    """
    order = torch.cat(list(values.values())).sort(descending=True, stable=True).indices
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    each = zip(values.items(), places.split([len(value) for value in values.values()]), strict=True)
    return {
        name: _together(place, blocks[name]).masked_fill(keep_highest([value], floors[name])[0], -1)
        for (name, value), place in each
    }


def _together(places: Tensor, block: int) -> Tensor:
    """`places`, from the best on in blocks that share the place of their middle unit."""
    if block == 1:
        return places
    ordered, where = places.sort()
    middle = torch.arange(len(places), device=places.device) // block * block + (block - 1) // 2
    return torch.empty_like(places).scatter_(0, where, ordered[middle.clamp(max=len(places) - 1)])


def _round_up(count: int, block: int, most: int) -> int:
    return min(-(-count // block) * block, most)


def _rank(score: Tensor) -> Tensor:
    """Middle of the unit's place from the bottom, as a share of the group, in (0, 1): one ranking of these is even."""
    places = torch.empty_like(score)
    places[score.sort(descending=True, stable=True).indices] = torch.arange(len(score), 0, -1).to(score) - 0.5
    return places / len(score)


def normalised(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each group's scores divided by their mean, so that groups of other scale can share one ranking."""
    return {name: score / score.mean().clamp(min=torch.finfo(score.dtype).tiny) for name, score in scores.items()}
