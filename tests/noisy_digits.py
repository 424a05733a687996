"""The small digits of scikit-learn, a net of four convolutions for them, and a loop that trains and prunes it."""

from __future__ import annotations

from itertools import pairwise

import torch
from fitting import Rows
from sklearn.datasets import load_digits
from torch import nn

from hf_prune import PruneConfig, Pruner
from hf_prune.graph import trace


def load() -> tuple[Rows, Rows]:
    """Noisy 8 x 8 images and labels, 1,200 to train on and 597 to test on."""
    digits, generator = load_digits(), torch.Generator().manual_seed(0)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images += 0.5 * torch.randn(images.shape, generator=generator)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order], torch.tensor(digits.target)[order]
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def net(seed: int) -> nn.Module:
    """Convolutions of 24, 24, 48 and 48 filters, each with its norm."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise((1, 24, 24, 48, 48))):
        layers += [nn.Conv2d(a, b, 3, stride=1 + i % 2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def train(
    model: nn.Module, pruning: PruneConfig | None, rows: Rows, seed: int, *, epochs: int, lr: float = 0.1
) -> tuple[nn.Module, list[float]]:
    """The finished model, and the multiply-adds of each step as a share of a dense one's."""
    images, labels = rows
    example, steps = {"input": images[:2]}, epochs * len(images) // 64
    graph = trace(model, example)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    pruner = None
    if pruning is not None:
        pruner = Pruner(model, pruning, example, data=[{"input": each} for each in images[:512].split(64)])
        pruner.attach()
        optimizer = pruner.wrap(optimizer)
        pruner.step(0, steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    drawn, costs = torch.Generator().manual_seed(seed), []
    for step in range(1, steps + 1):
        batch = torch.randint(0, len(images), (64,), generator=drawn)
        costs.append(graph.price(pruner.plan if pruner else None).multiply_adds / graph.price().multiply_adds)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images[batch]), labels[batch]).backward()
        optimizer.step()
        cosine.step()
        if pruner:
            pruner.step(step, steps)
    if pruner:
        pruner.finalize()
    return model.eval(), costs
