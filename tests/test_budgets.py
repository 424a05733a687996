"""Selection by price: beside a search that tries every number of units, and widths that are multiples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_prune
from hf_prune import MagnitudeConfig, MovementConfig, PruneConfig
from hf_prune.config import Goal
from hf_prune.graph import trace
from hf_prune.parts.budgets import fit_price
from hf_prune.parts.structures import group_structure
from hf_prune.tiny_models import tiny_image_model

PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}


def _resnet() -> Any:
    torch.manual_seed(0)
    return tiny_image_model(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2]).eval()


def _best(scores: dict[str, Tensor], count: int, multiple: int) -> dict[str, Tensor]:
    """The `count` highest; each group has all its units, or their number is rounded to a multiple, never to none."""
    ranked = sorted(((float(value), name) for name, score in scores.items() for value in score), reverse=True)
    plan = {}
    for name, score in scores.items():
        whole = multiple if len(score) >= 4 * multiple else 1
        width = sum(owner == name for _, owner in ranked[:count])
        if width < len(score):
            width = min(max((width + whole // 2) // whole * whole, whole), len(score))
        plan[name] = torch.zeros(len(score), dtype=torch.bool).index_fill(0, score.topk(width).indices, True)
    return plan


@pytest.mark.parametrize("multiple", [1, 5, 8])
def test_the_largest_plan_of_the_ranking_that_fits(multiple: int) -> None:
    model = _resnet()
    graph = trace(model, PIXELS)
    units = [group_structure(group, model) for group in graph.groups.values()]
    source = torch.Generator().manual_seed(0)
    scores = {each.name: torch.rand(each.units, generator=source) for each in units}
    dense, total = graph.price().multiply_adds, sum(map(len, scores.values()))
    for goal in (0.3, 0.5, 0.8):
        select = fit_price(
            graph, units, Goal("target_flops", goal), scope="global", min_keep=0.0, width_multiple=multiple
        )
        plans = (_best(scores, count, multiple) for count in reversed(range(total + 1)))
        expected = next(plan for plan in plans if graph.price(plan).multiply_adds <= goal * dense)
        found = select(scores, 1.0)
        assert found.keys() == expected.keys()
        assert all(torch.equal(keep, expected[name]) for name, keep in found.items())


@pytest.mark.parametrize("scope", ["global", "per_group"])
def test_pruned_models_have_such_widths_and_small_groups_any(scope: str) -> None:
    config = MagnitudeConfig(target_flops=0.5, width_multiple=16, min_keep=0.1, scope=scope)
    pruned, report = hf_prune.prune(_resnet(), config, PIXELS)
    large = {layer["kept"] for layer in report.layers.values() if layer["units"] >= 64}
    assert large and all(kept in (16, 32, 48, 64) for kept in large)
    assert any(layer["kept"] % 16 for layer in report.layers.values() if layer["units"] < 64)
    kept = trace(pruned.eval(), PIXELS).price().multiply_adds / trace(_resnet(), PIXELS).price().multiply_adds
    assert 0.35 < kept <= 0.5


@pytest.mark.parametrize(
    ("config", "settings", "complaint"),
    [
        (PruneConfig, {"width_multiple": 0}, "width_multiple must be a number"),
        (MovementConfig, {"final_sparsity": 0.5, "width_multiple": 8}, "MovementConfig does not round widths"),
        (MagnitudeConfig, {"final_sparsity": 0.5, "width_multiple": 8}, "a goal of target_params"),
        (MagnitudeConfig, {"target_units": 0.5, "width_multiple": 8}, "a goal of target_params"),
        (MagnitudeConfig, {"target_params": 0.5, "structure": "layer", "width_multiple": 8}, "units of groups"),
    ],
)
def test_where_widths_are_not_rounded(config: type[PruneConfig], settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config(**settings)
