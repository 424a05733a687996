"""What the loss says about weights: gradients of single examples, curvature, and the loss without some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_prune.parts.randomness import generator
from hf_prune.parts.scores import dense_parameter
from hf_prune.parts.statistics import Batch, Point, RunningMean, gather, widest
from hf_prune.parts.structures import output_dim
from hf_prune.types import PruneError


def example_gradients(
    model: nn.Module, batches: Iterable[Batch], tensors: Sequence[str], *, sampled: bool, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Gradients of each example's own loss, tensor by tensor: with its label, or with one drawn from the answer."""
    with _learning(model, tensors) as parameters:
        for number, example in enumerate(_examples(batches)):
            loss = _sampled_loss(model, example, generator(seed, "label", number)) if sampled else _loss(model, example)
            yield dict(zip(tensors, torch.autograd.grad(loss, parameters), strict=True))


def _examples(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        rows = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        for row in range(len(next(iter(rows.values())))):
            yield {key: value[row : row + 1] if key in rows else value for key, value in batch.items()}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    loss = model(**batch).loss
    if loss is None:
        raise PruneError('the model gave no loss: the calibration data needs "labels" for this score.')
    return loss


def _sampled_loss(model: nn.Module, example: Batch, draws: torch.Generator) -> Tensor:
    """Minus log-likelihood of a label that the model itself draws; one real output is a normal with variance 1."""
    logits = model(**{key: value for key, value in example.items() if key != "labels"}).logits
    if logits.shape[-1] == 1:
        noise = torch.randn(logits.shape, generator=draws).to(logits)
        return (logits - logits.detach() - noise).square().sum() / 2
    flat = logits.flatten(0, -2)
    labels = torch.multinomial(flat.detach().float().softmax(-1).cpu(), 1, generator=draws)[:, 0]
    return F.cross_entropy(flat, labels.to(flat.device), reduction="sum")


@contextmanager
def _learning(model: nn.Module, tensors: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """The trained parameters behind `tensors`, with gradients allowed also where the run froze them."""
    parameters: list[Any] = [dense_parameter(model, name) for name in tensors]
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def curvature(
    model: nn.Module, batches: Iterable[Batch], tensors: Sequence[str], *, source: str, seed: int = 0
) -> dict[str, Tensor]:
    """h of every weight, in a shape that broadcasts to the weight's; double precision."""
    if source == "covariance":
        return _input_moments(model, batches, tensors)
    means = {name: RunningMean() for name in tensors}
    if source == "hessian":
        found = _sketched_hessian(model, batches, tensors, seed)
    else:
        gradients = example_gradients(model, batches, tensors, sampled=source == "fisher", seed=seed)
        found = ({name: grad.float().square() for name, grad in each.items()} for each in gradients)
    for each in found:
        for name, value in each.items():
            means[name].add(value, 1)
    return {name: mean.result() for name, mean in means.items()}


def _sketched_hessian(
    model: nn.Module, batches: Iterable[Batch], tensors: Sequence[str], seed: int
) -> Iterator[dict[str, Tensor]]:
    """v * Hv of each batch, v random signs."""
    # The fast attention kernels have no second derivative.
    with _learning(model, tensors) as parameters, sdpa_kernel(SDPBackend.MATH):
        for number, batch in enumerate(batches):
            draws = generator(seed, "signs", number)
            signs = [torch.randint(0, 2, p.shape, generator=draws).to(p) * 2 - 1 for p in parameters]
            first = torch.autograd.grad(_loss(model, batch), parameters, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(first, signs, strict=True)]).sum()
            second = torch.autograd.grad(along, parameters)
            yield {name: (v * hv).detach() for name, v, hv in zip(tensors, signs, second, strict=True)}


def _input_moments(model: nn.Module, batches: Iterable[Batch], tensors: Sequence[str]) -> dict[str, Tensor]:
    paths = {name: name.rpartition(".")[0] for name in tensors}
    points = {name: Point(path, partial(_squares, model.get_submodule(path)), True) for name, path in paths.items()}
    return gather(model, batches, points)


def _squares(module: Any, taken: Tensor) -> tuple[Tensor, int]:
    """Sum of squares of what each weight is multiplied with, and over how many places."""
    if not isinstance(module, nn.Conv2d):
        squares = taken.float().square().sum(0, dtype=widest(taken.device))
        return squares[:, None] if output_dim(module) == 1 else squares[None], len(taken)
    unfolded = F.unfold(taken.float(), module.kernel_size, module.dilation, _padding(module), module.stride)
    squares = unfolded.square().sum((0, 2), dtype=widest(taken.device))
    kernels = squares.view(module.groups, 1, module.in_channels // module.groups, *module.kernel_size)
    spread = kernels.expand(-1, module.out_channels // module.groups, -1, -1, -1)
    return spread.reshape(module.weight.shape), unfolded.shape[0] * unfolded.shape[2]


def _padding(module: nn.Conv2d) -> Any:
    return module.padding if not isinstance(module.padding, str) else module._reversed_padding_repeated_twice[::-2]


@torch.no_grad()
def natural(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    sets: Iterable[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor] | None = None,
) -> list[float]:
    """What removing each set of weights adds to the loss; negative where it helps.

    sets: tensor name -> True where a weight is removed.  reference: what it becomes there; zero where omitted.
    """
    dense, found = _mean_loss(model, batches()), []
    for removed in sets:
        saved = {name: dense_parameter(model, name).data for name in removed}
        try:
            for name, gone in removed.items():
                other = saved[name].new_zeros(()) if reference is None else reference[name]
                dense_parameter(model, name).data = torch.where(gone, other, saved[name])
            found.append(_mean_loss(model, batches()) - dense)
        finally:
            for name, values in saved.items():
                dense_parameter(model, name).data = values
    return found


def _mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    mean = RunningMean()
    for batch in batches:
        rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        mean.add(_loss(model, batch) * rows, rows)
    return float(mean.result())
