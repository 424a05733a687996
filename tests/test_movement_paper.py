"""Acceptance of the movement spec: gradient identity, transfer toy, reactivation, schedule, hard concrete."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_prune import MovementConfig, Pruner
from hf_prune.config import Goal
from hf_prune.methods import movement
from hf_prune.parts.gates import ScoreGate
from hf_prune.parts.schedules import cubic
from hf_prune.parts.selection import top_k
from hf_prune.parts.structures import Blocks, Elements, Slices
from hf_prune.tiny_models import tiny_text_model

STRUCTURES = {
    "element": lambda shape: Elements("weight", shape),
    "block": lambda shape: Blocks("weight", shape, (2, 2)),
    "row": lambda shape: Slices("weight", shape, 0),
    "column": lambda shape: Slices("weight", shape, 1),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_gradient_identity_of_section_4(kind: str) -> None:
    """dL/dS = unit sum of W * G for every unit, masked or not; dL/dW = M * G."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False).double()
    structure = STRUCTURES[kind]((4, 6))
    gate = ScoreGate(structure, torch.device("cpu"))
    gate.insert(layer)
    keep = torch.arange(structure.units) % 2 == 0
    gate.set_keep(keep)
    x, target = torch.randn(8, 6).double(), torch.randn(8, 4).double()
    ((layer(x) - target) ** 2).sum().backward()

    weight = layer.parametrizations.weight.original
    mask = structure.expand(keep, "weight").double()
    by_hand = 2 * ((x @ (weight * mask).T) - target).T @ x  # G = dL/dW', computed without autograd
    expected_scores = structure.view(weight * by_hand, "weight").sum(-1).detach()
    # Scores are fp32 whatever the weights are, hence the looser bound for them.
    assert torch.allclose(gate.owner.scores.grad.double(), expected_scores, rtol=1e-6, atol=1e-6)
    assert torch.allclose(weight.grad, mask * by_hand, rtol=0, atol=1e-12)
    assert (gate.owner.scores.grad[~keep] != 0).all()


def _transfer_toy(seed: int, variant: str, lr: float) -> tuple[float, int]:
    """Acceptance B: 20 weights, ten start at 1.0 and move to 0.3, ten start at 0.1 and move to 0.6; half are kept."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.cat([torch.full((10,), 1.0), torch.full((10,), 0.1)])
    target = torch.cat([torch.full((10,), 0.3), torch.full((10,), 0.6)])
    model = nn.Sequential(nn.Linear(20, 1, bias=False), nn.Identity())
    with torch.no_grad():
        model[0].weight.copy_(start[None])
    steps = 400
    config = MovementConfig(
        final_sparsity=0.5, variant=variant, begin=40 / steps, end=1 - 80 / steps, score_lr=0.02, include=("0",)
    )
    pruner = Pruner(model, config)
    pruner.attach()
    optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=lr))
    for step in range(steps):
        pruner.step(step, steps)
        x = torch.randn(64, 20, generator=generator)
        loss = 0.5 * ((model(x)[:, 0] - x @ target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pruner.step(steps, steps)
    pruner.finalize()
    kept = model[0].weight.detach()[0]
    return float(0.5 * ((kept - target) ** 2).sum()), int((kept[:10] != 0).sum())


def test_transfer_toy_movement_beats_magnitude() -> None:
    movement_runs = [_transfer_toy(seed, "hard", lr=0.005) for seed in range(5)]
    magnitude_runs = [_transfer_toy(seed, "magnitude", lr=0.005) for seed in range(5)]
    movement_loss = sum(loss for loss, _ in movement_runs) / 5
    magnitude_loss = sum(loss for loss, _ in magnitude_runs) / 5
    assert movement_loss < 0.5 * magnitude_loss
    assert all(first_ten == 0 for _, first_ten in movement_runs)
    assert all(first_ten >= 7 for _, first_ten in magnitude_runs)


def test_reactivation_of_masked_units() -> None:
    """Acceptance C: useful weights whose scores start below the cut are back at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 1, bias=False), nn.Identity())
    target = torch.cat([torch.full((10,), 1.0), torch.zeros(10)])
    with torch.no_grad():
        model[0].weight.fill_(0.1)
    pruner = Pruner(model, MovementConfig(final_sparsity=0.5, begin=0.0, end=0.01, score_lr=0.05, include=("0",)))
    pruner.attach()
    (gate,) = pruner.recipe.gates
    with torch.no_grad():
        gate.owner.scores[:10] = -0.05
    optimizer = pruner.wrap(torch.optim.SGD(model.parameters(), lr=0.005))
    pruner.step(4, 400)
    assert not pruner.plan["0.weight"][:10].any()
    for step in range(4, 400):
        pruner.step(step, 400)
        x = torch.randn(64, 20)
        optimizer.zero_grad()
        ((model(x)[:, 0] - x @ target) ** 2).mean().backward()
        optimizer.step()
    pruner.step(400, 400)
    assert pruner.plan["0.weight"].tolist() == [True] * 10 + [False] * 10


def test_cubic_schedule_at_its_ends_and_middle() -> None:
    """Acceptance D: v at t_i, midpoint v_final + (v_init - v_final) / 8, and T - t_f."""
    share, goal = cubic(0.2, 0.8), Goal("final_sparsity", 0.85)
    assert goal.kept(share(0.2)) == 1.0
    assert goal.kept(share(0.5)) == pytest.approx(0.15 + (1 - 0.15) / 8)
    assert goal.kept(share(0.8)) == pytest.approx(0.15)
    assert goal.kept(share(1.0)) == pytest.approx(0.15)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.85, 0.9, 0.97])
def test_exact_count_per_matrix(sparsity: float) -> None:
    structures = [Elements("a", (10, 10)), Elements("b", (33, 7))]
    select = top_k(structures, Goal("final_sparsity", sparsity), scope="per_group", min_keep=0.0)
    scores = {"a": torch.randn(100), "b": torch.zeros(231)}  # ties must not change the count
    plan = select(scores, 1.0)
    for structure in structures:
        exact = round((1 - sparsity) * 1000) * structure.units // 1000
        assert int(plan[structure.name].sum()) == exact


def test_hard_concrete_by_hand() -> None:
    """In eval mode a gate is 0 iff S <= log(1/11) = -2.398; 2.197 at first gives 0.98; penalty sigmoid(S + 1.599)."""
    assert pytest.approx(-2.3979, abs=1e-4) == movement.CLOSED
    gate = movement.HardConcreteGate(Elements("w", (1, 4)), torch.device("cpu"), seed=0)
    gate.owner.eval()
    with torch.no_grad():
        gate.owner.scores.copy_(torch.tensor([-2.41, -2.39, 2.197, 9.0]))
    values = gate.owner.gate().detach()
    assert values[0] == 0 and values[1] > 0 and values[3] == 1
    assert values[2] == pytest.approx(0.98, abs=1e-3)
    assert gate.keep().tolist() == [False, True, True, True]
    assert pytest.approx(1.5986, abs=1e-4) == -movement.BETA * movement.CLOSED


def test_hard_concrete_draws_once_per_optimizer_step() -> None:
    gate = movement.HardConcreteGate(Elements("w", (4, 50)), torch.device("cpu"), seed=3, init=0.0)
    first = gate.owner.gate()
    assert torch.equal(first, gate.owner.gate())
    gate.owner.draw += 1
    second = gate.owner.gate()
    assert not torch.equal(first, second)
    assert ((first == 0).any() and (first == 1).any()) and first.min() >= 0 and first.max() <= 1


def test_hard_concrete_noise_differs_between_weights_seeds_and_steps() -> None:
    gates = {
        (seed, name): movement.HardConcreteGate(Elements(name, (4, 50)), torch.device("cpu"), seed=seed, init=0.0)
        for seed in (0, 1)
        for name in ("a", "b")
    }
    draws = [gate.owner.gate() for gate in gates.values()]
    assert not any(torch.equal(x, y) for i, x in enumerate(draws) for y in draws[:i])


def test_soft_penalty_carries_the_sigmoid_derivative() -> None:
    """lambda_t = lambda * v_t / v_final, and dR/dS = sigmoid'(S) / units."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Identity())
    pruner = Pruner(model, MovementConfig(variant="soft", penalty_weight=8.0, begin=0.0, end=1.0, include=("0",)))
    pruner.attach()
    (gate,) = pruner.recipe.gates
    pruner.step(5, 10)
    share = 1 - 0.5**3
    loss = pruner.loss(torch.zeros(()))
    assert loss.item() == pytest.approx(8.0 * share * 0.5)
    loss.backward()
    assert torch.allclose(gate.owner.scores.grad, torch.full((12,), 8.0 * share * 0.25 / 12))


def test_l0_without_a_goal_prunes_exactly_the_closed_gates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    pruner = Pruner(model, MovementConfig(variant="l0", include=("0",)))
    pruner.attach()
    (gate,) = pruner.recipe.gates
    with torch.no_grad():
        gate.owner.scores.copy_(torch.linspace(-4, 4, 64))
    scores, dense = gate.scores().clone(), model[0].parametrizations.weight.original.detach().clone()
    report = pruner.finalize()
    closed = (scores <= math.log(1 / 11)).view(8, 8)
    assert torch.equal(model[0].weight == 0, closed)
    assert report.sparsity == pytest.approx(closed.double().mean().item())
    stretched = (scores.sigmoid() * 1.2 - 0.1).clamp(0, 1).view(8, 8)
    assert torch.allclose(model[0].weight, dense * stretched)


def test_hybrid_removes_tied_neurons_and_blocks() -> None:
    """Acceptance E: zero rows of FFN-in == zero columns of FFN-out; the narrow model is as small as the plan says."""
    model = tiny_text_model().eval()
    dense_size = sum(parameter.numel() for parameter in model.parameters())
    batch = {"input_ids": torch.randint(0, 40, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    config = MovementConfig(final_sparsity=0.6, structure="hybrid", block_shape=(4, 4), begin=0.0, end=0.5)
    pruner = Pruner(model, config, example_inputs=batch)
    pruner.attach()
    with torch.no_grad():
        for gate in pruner.recipe.gates:
            gate.owner.scores.normal_()
    pruner.step(10, 10)
    plan = {name: keep.clone() for name, keep in pruner.plan.items()}
    for i, layer in enumerate(model.bert.encoder.layer):
        rows = (layer.intermediate.dense.weight != 0).any(1)
        columns = (layer.output.dense.weight != 0).any(0)
        neurons = next(keep for name, keep in plan.items() if f"layer.{i}.intermediate" in name)
        assert torch.equal(rows, neurons) and torch.equal(columns, neurons)
        assert not layer.intermediate.dense.bias[~neurons].any()
    with torch.no_grad():
        masked = model(**batch).logits
        report = pruner.finalize()
        assert (model(**batch).logits - masked).abs().max() < 1e-5
    removed = sum(int((~keep).sum()) * (2 * 16 + 1) for name, keep in plan.items() if len(keep) == 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == dense_size - removed
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    blocks = model.bert.encoder.layer[0].attention.self.query.weight.view(4, 4, 4, 4).permute(0, 2, 1, 3)
    assert torch.equal(
        (blocks != 0).any(-1).any(-1).flatten(), plan["bert.encoder.layer.0.attention.self.query.weight"]
    )
