"""Small runs on scikit-learn's digits: what a method does to a real, if easy, task within seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gated_models import answer
from sklearn.datasets import load_digits
from torch import Tensor, nn

EVERY, VALIDATION, TEST = slice(None), slice(1200, 1500), slice(1500, None)
"""The first 1,200 rows are for training."""


def digits() -> tuple[Tensor, Tensor]:
    """The 8 x 8 digits of scikit-learn, shuffled, drawn at twice the size."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(images, scale_factor=2)[order], torch.tensor(bunch.target)[order]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    before_step: Callable[[], None] = lambda: None,
    after_step: Callable[[int], None] = lambda step: None,
    steps: int = 400,
) -> None:
    """Cosine from the optimizer's rate to zero, on the first 1,200 rows."""
    rows, model = torch.Generator().manual_seed(1), model.train()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        batch = torch.randint(0, 1200, (64,), generator=rows)
        optimizer.zero_grad()
        model(pixel_values=data[0][batch], labels=data[1][batch]).loss.backward()
        before_step()
        optimizer.step()
        cosine.step()
        after_step(step)


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor], rows: slice = EVERY) -> float:
    """Percent of the rows: of all of them one is 0.06 points."""
    was_training = model.training
    hits = answer(model.eval(), {"pixel_values": data[0][rows]}).argmax(-1) == data[1][rows]
    model.train(was_training)
    return 100.0 * hits.float().mean().item()
