"""The multiplier of a penalty: direction, limits, and a closed loop with scores that integrate it."""

from __future__ import annotations

import math

import pytest
import torch

from hf_prune.config import Goal
from hf_prune.parts.controllers import DualAscent
from hf_prune.parts.schedules import cubic, one_shot


def _controller(gain: float = 8.0) -> DualAscent:
    return DualAscent(2.0, Goal("final_sparsity", 0.9), one_shot(0.0), gain=gain)


def test_first_weight_is_the_given_one() -> None:
    assert _controller().weight == 2.0


def test_weight_rises_while_too_dense_and_falls_while_too_sparse() -> None:
    dense, sparse = _controller(), _controller()
    dense.observe({"progress": 0.1, "sparsity": 0.8})
    sparse.observe({"progress": 0.1, "sparsity": 1.0})
    # gap 0.1: exp(8 * 0.1 + 2 * 8 * 0.1 * 0.1)
    assert dense.weight == pytest.approx(2.0 * math.exp(0.8 + 0.16))
    assert sparse.weight == pytest.approx(2.0 * math.exp(-0.8 - 0.16))


def test_memory_is_limited_so_that_a_long_wait_unwinds() -> None:
    controller = _controller(gain=100.0)
    controller.observe({"progress": 0.9, "sparsity": 0.0})
    assert controller.memory == pytest.approx(math.log(100.0))


def test_evaluation_metrics_without_progress_are_ignored() -> None:
    controller = _controller()
    controller.observe({"eval_accuracy": 0.9})
    assert controller.weight == 2.0


@pytest.mark.parametrize("first", [1.0, 3.0, 10.0])
def test_closed_loop_follows_the_schedule(first: float) -> None:
    """Scores under Adam with noisy task gradients, pushed by the penalty: sparsity lands near the goal."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.nn.Parameter(torch.zeros(4000))
    useful = torch.randn(4000, generator=generator)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    schedule = cubic(0.05, 0.7)
    controller = DualAscent(first, Goal("final_sparsity", 0.8), schedule, gain=16.0)
    for step in range(400):
        progress = step / 400
        reached = float((scores.sigmoid() <= 0.1 * schedule(progress)).float().mean())
        controller.observe({"progress": progress, "sparsity": reached})
        if progress >= 0.7:
            break
        noise = torch.randn(4000, generator=generator)
        optimizer.zero_grad()
        (controller.weight * scores.sigmoid().sum()).backward()
        scores.grad -= useful + 2.0 * noise
        optimizer.step()
    assert reached == pytest.approx(0.8, abs=0.06)
