"""Acceptance of the BWCP spec: Newton iterates, probabilities, whitening, masks, exact merge, what the penalty cuts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from digits import accuracy, digits
from gated_models import MODELS, answer, inputs_of, scramble
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_prune import BWCPConfig, PruneError, Pruner
from hf_prune.config import Goal
from hf_prune.graph import trace
from hf_prune.methods.bwcp import (
    WhitenedNorm,
    activation_probability,
    logistic_noise,
    soft_mask,
    whitening,
)
from hf_prune.parts.budgets import fit_price
from hf_prune.parts.randomness import generator
from hf_prune.parts.structures import group_structure
from hf_prune.tiny_models import tiny_image_model

IMAGES = {"pixel_values": torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0))}


def _independent(rows: int = 2) -> Tensor:
    """Observations of unit variance and no correlation, `(1, rows, observations)`."""
    return torch.linalg.qr(torch.randn(64, rows, dtype=torch.float64)).Q.T[None] * 8.0


def test_newton_iterates_by_hand() -> None:
    gamma = torch.ones(1, 2, dtype=torch.float64)
    for steps, expected in enumerate([1.25, 1.38671875, 1.41341694], start=1):  # towards sqrt(2)
        root = whitening(_independent(), gamma, steps)
        assert torch.allclose(root, expected * torch.eye(2, dtype=torch.float64), atol=1e-7)
    root = whitening(_independent(), gamma, 5)
    assert root[0, 0, 0].item() == pytest.approx(math.sqrt(2), abs=1e-6)


def test_probabilities_by_hand() -> None:
    gamma, beta = torch.ones(2, dtype=torch.float64), torch.tensor([0.5, -0.5], dtype=torch.float64)
    plain = activation_probability(gamma, beta, 0.05)
    root = whitening(_independent(), gamma[None], 1)[0]
    raised = activation_probability(root @ gamma, root @ beta, 0.05)
    assert plain.tolist() == pytest.approx([0.67364, 0.29116], abs=1e-5)
    assert raised.tolist() == pytest.approx([0.67724, 0.29460], abs=1e-5)
    dead = activation_probability(torch.tensor([1e-6]), torch.tensor([-1.0]), 0.05)
    assert dead < 1e-12 and activation_probability(1.25 * torch.tensor([1e-6]), torch.tensor([-1.25]), 0.05) < 1e-12


def test_probabilities_without_scale_are_their_limits() -> None:
    gamma = torch.zeros(3, requires_grad=True)
    probability = activation_probability(gamma, torch.tensor([-1.0, 0.05, 1.0]), 0.05)
    assert probability.tolist() == [0.0, 0.5, 1.0]
    probability.sum().backward()
    assert gamma.grad.isfinite().all()
    assert whitening(torch.zeros(1, 3, 5), torch.zeros(1, 3), 5).isfinite().all()


def _correlated(channels: int, observations: int) -> Tensor:
    mixing = torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=generator(0)) / channels**0.5
    x = mixing.double() @ torch.randn(channels, observations, generator=generator(1)).double()
    x = x - x.mean(1, keepdim=True)
    return x / x.square().mean(1, keepdim=True).sqrt()


def test_whitening_of_a_correlated_batch() -> None:
    gamma = torch.linspace(0.6, 1.4, 8, dtype=torch.float64)[None]
    centred = gamma[0, :, None] * _correlated(8, 400)

    def covariance(iterations: int) -> Tensor:
        x = whitening(centred[None], gamma, iterations)[0] @ centred
        return x @ x.T / x.shape[1] / gamma.square().sum()

    assert (covariance(10) - torch.eye(8)).abs().max() < 1e-3
    plain, partly = centred @ centred.T / 400 / gamma.square().sum(), covariance(5)

    def mixed(matrix: Tensor) -> float:
        """Size of what is beside the diagonal, against it."""
        return float((matrix - matrix.diag().diag()).norm() / matrix.diag().norm())

    assert mixed(partly) < 0.5 * mixed(plain)


def test_gradients() -> None:
    gamma, beta = torch.rand(1, 3, dtype=torch.float64) + 0.5, torch.randn(3, dtype=torch.float64)
    noise = logistic_noise(3, generator(2))

    def whole(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        root = whitening(gamma[..., None] * x, gamma, 3)[0]
        probability = activation_probability(root @ gamma[0], root @ beta, 0.05)
        return soft_mask(probability.logit(), noise, 0.5)[:, None] * (root @ x[0])

    inputs = (torch.randn(1, 3, 7, dtype=torch.float64), gamma, beta)
    assert torch.autograd.gradcheck(whole, [each.requires_grad_() for each in inputs])
    P = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    mask = soft_mask(P.logit(), noise[:2], 0.5)
    (grad,) = torch.autograd.grad(mask.sum(), P)
    assert torch.allclose(grad, mask * (1 - mask) / (0.5 * P * (1 - P)))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 5.0])
def test_masks_are_drawn_with_the_probability(temperature: float) -> None:
    noise = logistic_noise(50_000, generator("masks"))
    mask = soft_mask(torch.full((50_000,), 0.3, dtype=torch.float64).logit(), noise, temperature)
    assert (mask > 0.5).double().mean().item() == pytest.approx(0.3, abs=0.01)


def _attached(model: nn.Module, config: BWCPConfig, inputs: Any = IMAGES) -> Pruner:
    pruner = Pruner(model, config, inputs)
    pruner.attach()
    return pruner


@pytest.mark.parametrize(
    ("name", "block"),
    [("basic", 16), ("bottleneck", 3), ("residual", 3), pytest.param("depthwise", 16, marks=pytest.mark.slow)],
)
def test_exact_when_merged(name: str, block: int) -> None:
    make, residual, _ = MODELS[name]
    torch.manual_seed(1)
    model, inputs = scramble(make()), inputs_of(name)
    pruner = _attached(model, BWCPConfig(target_params=0.7, residual=residual, block_size=block), inputs)
    for gate in pruner.recipe.gates:
        for function in gate.functions:
            function.mean_root += 0.1 * torch.randn(function.mean_root.shape, generator=generator(gate.name))
    pruner.step(10, 10)
    mixed = answer(model, inputs)
    plan = {group: keep.clone() for group, keep in pruner.plan.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as constants that are lost
        pruner.finalize()
    scale = max(1.0, float(mixed.abs().max()))
    assert (answer(model, inputs) - mixed).abs().max() <= 1e-5 * scale
    assert not any(isinstance(module, WhitenedNorm) for module in model.modules())
    assert trace(model, inputs).price() == pruner.graph.traced.price(plan)


def test_a_layer_computes_what_the_equations_say() -> None:
    """One training step of a gate, against the same written out; its running mean; evaluation from that mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.normal_(model[1].bias)
    config = BWCPConfig(target_params=0.7, include=("0",), begin=0.5, mean_momentum=0.25)
    pruner = _attached(model, config, (IMAGES["pixel_values"].double(),))
    pruner.step(1, 10)
    (gate,), x = pruner.recipe.gates, torch.randn(4, 3, 9, 9, dtype=torch.float64)
    function, gamma, beta = gate.function, model[1].weight, model[1].bias
    xt = nn.functional.batch_norm(model[0](x), None, None, gamma, beta, training=True)
    flat = xt.movedim(1, 0).flatten(1) - beta[:, None]
    M = whitening(flat[None], gamma[None], 5)[0]
    P = activation_probability(M @ gamma, M @ beta, 0.05)
    mask = soft_mask(P.logit(), function.noise, 0.5)
    expected = mask[:, None, None] * torch.einsum("ij,njhw->nihw", M, xt)
    assert torch.allclose(model[:2].train()(x), expected)
    assert torch.allclose(function.mean_root[0], 0.75 * torch.eye(6) + 0.25 * M)
    mean = function.mean_root[0]
    P = activation_probability(mean @ gamma, mean @ beta, 0.05)
    norm = model[1]
    xt = nn.functional.batch_norm(model[0](x), norm.running_mean, norm.running_var, gamma, beta)
    evaluated = P[:, None, None] * torch.einsum("ij,njhw->nihw", mean, xt)
    assert torch.allclose(model[:2].eval()(x), evaluated)


def test_streams_have_one_mask() -> None:
    pruner = _attached(scramble(tiny_image_model(depths=[2, 2])), BWCPConfig(target_params=0.7))
    stream = next(gate for gate in pruner.recipe.gates if len(gate.writers) > 2)
    each = [function.probability(function.mix(function.mean_root)) for function in stream.functions]
    together = [function.shared_probability() for function in stream.functions]
    assert len({id(function) for function in stream.functions}) == len(stream.writers)
    assert torch.allclose(together[0], torch.stack(each).log().mean(0).exp(), atol=1e-6)
    assert all(torch.allclose(together[0], other) for other in together)
    pruner.step(1, 10)
    assert all(torch.equal(function.noise, stream.function.noise) for function in stream.functions)


def test_draws_change_with_the_step_and_nothing_else() -> None:
    first, second = (_attached(tiny_image_model(), BWCPConfig(target_params=0.7)) for _ in range(2))
    noise = []
    for pruner in (first, second):
        pruner.step(3, 10)
        noise.append(torch.cat([gate.function.noise for gate in pruner.recipe.gates]))
    assert torch.equal(*noise)
    first.step(4, 10)
    assert not torch.equal(noise[0], torch.cat([gate.function.noise for gate in first.recipe.gates]))
    assert not torch.equal(first.recipe.gates[0].function.noise[:8], first.recipe.gates[1].function.noise[:8])


def test_penalty_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model[1].weight.data = torch.tensor([1.0, -2.0, 0.5, 0.01])
    model[1].bias.data = torch.tensor([0.3, -0.1, 0.2, -5.0])
    config = BWCPConfig(include=("0",), lambda1=0.1, lambda2=0.01)
    pruner = _attached(model, config, (IMAGES["pixel_values"],))
    penalty = pruner.recipe.penalties["scales"]
    assert float(penalty(0.1)) == 0.0, "none before begin"
    # The last channel is dead: its offset is pulled no further.
    assert float(penalty(0.5)) == pytest.approx(0.1 * 3.51 + 0.01 * 0.4, abs=1e-6)
    penalty(0.5).backward()
    assert torch.allclose(model[1].weight.grad, torch.tensor([0.1, -0.1, 0.1, 0.1]))
    assert torch.allclose(model[1].bias.grad, torch.tensor([0.01, 0.01, 0.01, 0.0]))


def test_without_a_goal_likely_channels_stay() -> None:
    model = scramble(tiny_image_model())
    pruner = _attached(model, BWCPConfig(residual=False))
    scores = pruner.recipe.controller.scores()
    pruner.step(9, 10)
    assert pruner.sparsity == 0.0
    pruner.step(10, 10)
    assert all(torch.equal(pruner.plan[name], score > 0.5) for name, score in scores.items())
    assert pruner.sparsity > 0.0


def test_dual_ascent_raises_the_penalty_while_the_model_is_too_dear() -> None:
    model = scramble(tiny_image_model())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.fill_(3.0)  # every channel is active
    pruner = _attached(model, BWCPConfig(target_flops=0.4, begin=0.0))
    weights = []
    for step in range(8):
        pruner.step(step, 10)
        weights.append(pruner.logs()["penalty_weight"])
    assert all(later > sooner for sooner, later in pairwise(weights[1:])), weights


class Digits(nn.Module):
    """Three convolutions with norms whose channels begin active, as those of a longer run have become."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            nn.init.constant_(layers[-2].bias, 0.5)
        self.body, self.head = nn.Sequential(*layers), nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.head(self.body(pixel_values).mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _train(model: nn.Module, loss: Callable[..., Tensor], optimizer: Any, after_step: Any, steps: int) -> None:
    data, rows = digits(), torch.Generator().manual_seed(1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(1, steps + 1):
        batch = torch.randint(0, 1200, (64,), generator=rows)
        optimizer.zero_grad()
        loss(pixel_values=data[0][batch], labels=data[1][batch]).backward()
        optimizer.step()
        cosine.step()
        after_step(step)


def _whitened(weight: float, steps: int) -> tuple[float, float, float]:
    """Accuracy before and after the cut, and the share of multiply-adds that is left."""
    model, data = Digits(), digits()
    config = BWCPConfig(include=("body.*",), lambda1=weight, lambda2=weight, sharpness=200.0)
    pruner = _attached(model, config, {"pixel_values": data[0][:2]})
    optimizer = pruner.wrap(torch.optim.AdamW(model.parameters(), lr=3e-3))
    pruner.step(0, steps)

    def move(step: int) -> None:
        if step < steps:
            pruner.step(step, steps)

    _train(model, lambda **batch: pruner.batch_loss(model, batch), optimizer, move, steps)
    before = accuracy(model, data)
    pruner.step(steps, steps)
    graph = pruner.graph.traced
    kept = graph.price(pruner.plan).multiply_adds / graph.price().multiply_adds
    pruner.finalize()
    return before, accuracy(model, data), kept


def _slimmed(weight: float, steps: int, kept: float) -> float:
    """Accuracy after the smallest scales of a net trained under an L1 penalty on them are cut, to that price."""
    model, data = Digits(), digits()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss(**batch: Tensor) -> Tensor:
        return model(**batch).loss + weight * sum(norm.weight.abs().sum() for norm in norms.values())

    _train(model, loss, optimizer, lambda step: None, steps)
    graph = trace(model.eval(), {"pixel_values": data[0][:2]})
    units = [group_structure(group, model) for group in graph.groups.values()]
    select = fit_price(graph, units, Goal("target_flops", kept), scope="global", min_keep=0.0)
    plan = select({f"body.{i}": model.body[i + 1].weight.detach().abs() for i in (0, 3, 6)}, 1.0)
    with torch.no_grad():
        for name, keep in plan.items():
            norm = model.body[int(name.removeprefix("body.")) + 1]
            norm.weight *= keep
            norm.bias *= keep
    return accuracy(model, data)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_penalty_cuts_and_the_cut_costs_nothing() -> None:
    before, after, kept = _whitened(0.12, steps=600)
    assert kept < 0.7 and after > before - 0.5
    *_, alone = _whitened(0.0, steps=600)
    assert alone > 0.9, "without penalty next to nothing goes"
    assert after >= max(_slimmed(weight, 600, kept) for weight in (1e-3, 1e-2))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"final_sparsity": 0.5}, "takes target_flops"),
        ({"target_flops": 1.0}, "removes nothing"),
        ({"target_flops": 0.5, "lambda1": 0.0, "lambda2": 0.0}, "nothing pulls"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"sharpness": 0.5}, "sharpness must be"),
        ({"mean_momentum": 0.0}, "mean_momentum must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _attached(tiny_image_model(), BWCPConfig(**settings))


def test_a_model_without_batch_norms_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(PruneError, match="batch norms with scale and offset"):
        _attached(model, BWCPConfig(target_params=0.8, include=("0",)), (IMAGES["pixel_values"],))
