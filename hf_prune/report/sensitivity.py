"""How much the loss rises when units of one group go, for every group by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_prune.graph import Graph, mask
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.structures import group_structure
from hf_prune.types import Plan

RATIOS = tuple(tenths / 10 for tenths in range(1, 10))
DENSE = "dense"

Losses = dict[str, float]
"""`DENSE` or `group@fraction removed` -> mean loss a sample."""


def key(group: str, ratio: float) -> str:
    """Under which name a loss is kept."""
    return f"{group}@{ratio:.1f}"


@torch.no_grad()
def losses(
    model: nn.Module,
    graph: Graph,
    batches: Sequence[Mapping[str, Tensor]],
    known: Losses,
    after_group: Callable[[Losses], None],
) -> Losses:
    """The loss with each of `RATIOS` of each group removed; those in `known` are not measured again.

    The units of smallest mean |w| go first, and stay in place as zeros; the model is the same afterwards.
    after_group: called with what is known after each group.
    """
    found = {DENSE: known.get(DENSE) or mean_loss(model, batches), **known}
    units = [group_structure(group, model) for group in graph.groups.values()]
    scores = unit_norms(model, units, order=1)()
    for group in graph.groups.values():
        for ratio in RATIOS:
            if key(group.name, ratio) not in found:
                with _masked(model, graph, {group.name: _keep(scores[group.name], ratio)}):
                    found[key(group.name, ratio)] = mean_loss(model, batches)
        after_group(found)
    return found


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """The model's own loss, mean over the samples of labelled `batches`."""
    device = next(model.parameters()).device
    total, samples = 0.0, 0
    for batch in batches:
        size = len(batch["labels"])
        total += size * float(model(**{name: value.to(device) for name, value in batch.items()}).loss)
        samples += size
    return total / samples


def fingerprint(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> str:
    """A hash of every weight, buffer and input."""
    digest = hashlib.sha256()
    for tensors in (model.state_dict(), *batches):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _keep(scores: Tensor, ratio: float) -> Tensor:
    """All but the lowest `ratio` of the units, and one at least."""
    removed = min(round(ratio * len(scores)), len(scores) - 1)
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.cpu().argsort(stable=True)[:removed]] = False
    return keep


@contextmanager
def _masked(model: nn.Module, graph: Graph, plan: Plan) -> Iterator[None]:
    state = model.state_dict()
    touched = {member.tensor for name in plan for member in graph.groups[name].members}
    before = {name: state[name].clone() for name in touched}
    mask(model, graph, plan)
    try:
        yield
    finally:
        for name, value in before.items():
            state[name].copy_(value)
