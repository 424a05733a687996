"""Acceptance of the DMCP spec: closed forms, sampler, soft and hard gates, separate steps, a net of unequal layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_prune import DMCPConfig, PruneError, Pruner, PruneTrainer
from hf_prune.methods.dmcp import MarkovWidth, width_grid
from hf_prune.parts.budgets import PRICES
from hf_prune.parts.channel_gates import passing
from hf_prune.parts.randomness import generator
from hf_prune.testing import Run, tiny_cases
from hf_prune.tiny_models import tiny_image_model, tiny_text_model

IMAGES = {"pixel_values": torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0))}
WIDE = {"embedding_size": 20, "hidden_sizes": [20, 40], "depths": [1, 1]}


def _width(units: int = 64, alpha: Tensor | float = 0.0) -> MarkovWidth:
    width = MarkovWidth(torch.arange(units), torch.zeros((), dtype=torch.float64), width_grid(units, 0.1, 0.1))
    with torch.no_grad():
        width.alpha.copy_(torch.as_tensor(alpha, dtype=torch.float64))
    return width


def _logit(p: float) -> float:
    return float(torch.tensor(p, dtype=torch.float64).logit())


def test_the_grid() -> None:
    assert width_grid(64, 0.1, 0.1) == (10, 6, 9)
    assert width_grid(8, 0.1, 0.1) == (1, 1, 7), "groups of one where a tenth is less"
    assert width_grid(30, 0.1, 0.1) == (3, 3, 9)
    assert width_grid(16, 0.5, 0.25) == (8, 4, 2)


def test_expected_width() -> None:
    assert _width().expected().item() == pytest.approx(15.98828125, abs=1e-12)  # 10 + 6 (1 - 2^-9)
    assert _width(alpha=_logit(0.9)).expected().item() == pytest.approx(43.0792936, abs=1e-7)


def test_expected_width_is_the_mean_of_its_law() -> None:
    width = _width(alpha=torch.randn(9, generator=generator(1)))
    p = width.alpha.detach().sigmoid()
    mean, reached = 0.0, 1.0
    for k in range(10):  # the walk ends after k groups
        ends = reached * (1.0 - float(p[k])) if k < 9 else reached
        mean += (10 + 6 * k) * ends
        reached *= float(p[k]) if k < 9 else 1.0
    assert width.expected().item() == pytest.approx(mean, abs=1e-9)


def test_gradient_and_order_of_the_probabilities() -> None:
    for seed in range(5):
        width = _width(alpha=5 * torch.randn(9, generator=generator(seed)))
        assert (width.probabilities().diff() <= 0).all()
    assert torch.autograd.gradcheck(lambda alpha: 10 + 6 * alpha.sigmoid().cumprod(0).sum(), _width(alpha=0.3).alpha)
    width, step = _width(alpha=0.3), 1e-6
    width.expected().backward()
    for k in range(9):
        moved = width.alpha.detach().clone()
        moved[k] += step
        difference = (_width(alpha=moved).expected() - width.expected()).item() / step
        assert width.alpha.grad[k].item() == pytest.approx(difference, abs=1e-4)


def test_sampler() -> None:
    width = _width(alpha=torch.linspace(2.0, -1.0, 9))
    walks = width.walks(20_000, generator("walks")).double()
    assert walks.mean().item() == pytest.approx(width.expected().item(), rel=0.01)
    assert walks.min() >= 10 and walks.max() <= 64 and not ((walks - 10) % 6).any()
    drawn = torch.tensor([width.uniform(generator("uniform", i)) for i in range(500)])
    assert set(drawn.tolist()) == set(range(10, 65, 6))


def _attached(config: DMCPConfig, **sizes: Any) -> Pruner:
    torch.manual_seed(0)
    model = tiny_image_model(**{**WIDE, **sizes}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    pruner = Pruner(model, config, IMAGES)
    pruner.attach()
    return pruner


@torch.no_grad()
def _logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**(inputs or IMAGES)).logits


@pytest.mark.parametrize("order", ["natural", "l1"])
def test_soft_is_hard_at_the_limits(order: str) -> None:
    pruner = _attached(DMCPConfig(target_flops=0.5, order=order, min_keep=0.2, width_step=0.2))
    widths, model = pruner.recipe.controller.widths, pruner.model
    assert len(widths) == 4
    dense = _logits(model)
    with torch.no_grad():
        for width in widths:
            width.alpha.fill_(40.0)
    with passing({width: width.soft() for width in widths}):
        assert (_logits(model) - dense).abs().max() <= 1e-6

    with torch.no_grad():
        for width in widths:
            width.alpha[2] = -40.0
    with passing({width: width.soft() for width in widths}):
        soft = _logits(model)
    kept = {gate.name: gate.function.prefix(gate.function.least + 2 * gate.function.size) for gate in
            pruner.recipe.gates}  # fmt: skip
    for gate in pruner.recipe.gates:
        gate.set_keep(kept[gate.name])
    assert (_logits(model) - soft).abs().max() <= 1e-6
    assert (soft - dense).abs().max() > 1e-3
    report = pruner.finalize()
    assert (_logits(model) - soft).abs().max() < 1e-5
    assert {name: layer["kept"] for name, layer in report.layers.items()} == {n: int(k.sum()) for n, k in kept.items()}


def test_the_prefix_follows_the_size_of_the_filters() -> None:
    pruner = _attached(DMCPConfig(target_flops=0.5))
    gate = next(gate for gate in pruner.recipe.gates if len(gate.writers) == 1)
    weight = pruner.model.get_parameter(f"{gate.writers[0].layer}.weight")
    norms = weight.detach().abs().flatten(1).mean(1)
    keep = gate.function.prefix(7)
    assert int(keep.sum()) == 7 and norms[keep].min() > norms[~keep].max()
    soft = gate.function.soft()[norms.argsort(descending=True)]
    assert (soft.diff() <= 0).all() and (soft[: gate.function.least] == 1).all()


def test_budget_loss_by_hand() -> None:
    pruner = _attached(DMCPConfig(target_flops=0.5, budget_weight=0.1))
    search = pruner.recipe.controller
    for price, wanted in ((0.3, 0.2), (0.46, 0.04), (0.52, 0.045)):
        search.price = lambda sizes, price=price: torch.tensor(price, dtype=torch.float64)
        assert search.budget_loss(0.5).item() == pytest.approx(0.1 * torch.tensor(wanted).log().item(), abs=1e-5)
    for price in (0.475, 0.49):
        search.price = lambda sizes, price=price: torch.tensor(price, dtype=torch.float64)
        assert search.budget_loss(0.5).item() == 0.0


@pytest.mark.parametrize(("far", "sign"), [(-2.0, -1.0), (4.0, 1.0)])
def test_the_budget_pulls_towards_the_goal_from_either_side(far: float, sign: float) -> None:
    pruner = _attached(DMCPConfig(target_flops=0.5))
    search = pruner.recipe.controller
    with torch.no_grad():
        for width in search.widths:
            width.alpha.fill_(far)
    search.budget_loss(0.5).backward()
    assert all((sign * width.alpha.grad > 0).all() for width in search.widths)


def test_either_the_weights_or_the_probabilities_move() -> None:
    case = next(case for case in tiny_cases("dmcp") if case.variant == "flops")
    run = Run(case, steps=20)
    alphas = [width.alpha for width in run.pruner.recipe.controller.widths]
    known = {id(alpha) for alpha in alphas}
    weights = [parameter for parameter in run.model.parameters() if id(parameter) not in known]
    seen = []
    for step in range(20):
        name = run.pruner.phase.name
        before = [[p.detach().clone() for p in each] for each in (alphas, weights)]
        run.advance(to=step + 1)
        moved = [
            any(not torch.equal(old, new) for old, new in zip(olds, news, strict=True))
            for olds, news in zip(before, (alphas, weights), strict=True)
        ]
        assert moved == [name == "probabilities", name != "probabilities"]
        seen.append(name)
    assert seen[:4] == ["weights"] * 4 and seen[14:] == ["tune"] * 6
    assert seen[4:14] == ["weights", "probabilities"] * 5


def test_narrow_passes_of_one_step_are_the_same_for_every_part_of_the_batch() -> None:
    search = _attached(DMCPConfig(target_flops=0.5, random_widths=6, uniform_share=0.5)).recipe.controller
    search.observe({"progress": 0.2})
    nets = list(search._narrower())
    assert nets == list(search._narrower()) and len(nets) == 7
    assert nets[0] == [width.least for width in search.widths]
    assert len({tuple(net) for net in nets}) > 2
    search.observe({"progress": 0.21})
    assert nets != list(search._narrower())


@pytest.mark.parametrize("final", ["expected", "sampled"])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_the_final_price_is_the_goal(final: str, alpha: float) -> None:
    config = DMCPConfig(target_flops=0.5, final=final)
    pruner = _attached(config, embedding_size=64, hidden_sizes=[64, 128])
    for width in pruner.recipe.controller.widths:
        nn.init.constant_(width.alpha, alpha)
    graph, dense = pruner.graph.traced, PRICES["target_flops"](pruner.graph.traced, None)
    pruner.step(9, 10)
    assert PRICES["target_flops"](graph, pruner.plan) / dense == pytest.approx(0.5, rel=0.01)
    for sizes in pruner.recipe.controller._candidates():
        assert pruner.recipe.controller._cost(sizes) == pytest.approx(0.5, rel=0.0101)


def test_the_best_sample_wins() -> None:
    config = DMCPConfig(target_flops=0.4, final="sampled", samples=4, begin=0.2, end=0.6)
    pruner = _attached(config, embedding_size=32, hidden_sizes=[32, 64])
    search, labels = pruner.recipe.controller, torch.tensor([0, 1])
    pruner.step(5, 10)
    assert pruner.phase.name == "choose"
    pruner.model.train()
    pruner.batch_loss(pruner.model, {**IMAGES, "labels": labels})
    pruner.batch_loss(pruner.model, {**IMAGES, "labels": labels.flip(0)})
    candidates, losses = list(search._candidates()), search.tried[1]
    assert len(candidates) == len(losses) == 5
    pruner.step(6, 10)
    best = candidates[int(losses.argmin())]
    assert [int(pruner.plan[gate.name].sum()) for gate in pruner.recipe.gates] == best


class Separable(nn.Module):
    """A wide layer, a depthwise one behind it, and a narrow one, as MobileNets have them."""

    def __init__(self) -> None:
        super().__init__()
        wide, depthwise = nn.Conv2d(3, 24, 1, bias=False), nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        layers = [wide, nn.BatchNorm2d(24), nn.ReLU6(), depthwise, nn.BatchNorm2d(24), nn.ReLU6()]
        self.body = nn.Sequential(*layers, nn.Conv2d(24, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(self.body(pixel_values).mean((2, 3))))


def test_depthwise_norms_do_not_undo_the_soft_gate() -> None:
    torch.manual_seed(0)
    model = Separable().train()
    pruner = Pruner(model, DMCPConfig(target_flops=0.5, include=("body.0",)), IMAGES)
    pruner.attach()
    (gate,) = pruner.recipe.gates
    assert [writer.host for writer in gate.writers] == ["body.1", "body.4"]
    with passing({gate.function: gate.function.soft()}):
        model(**IMAGES).logits.square().sum().backward()
    assert gate.function.alpha.grad.abs().max() > 1e-3
    model.eval()
    pruner.step(10, 10)
    cut = _logits(model)
    pruner.finalize()
    assert model.body[3].groups < 24 and (_logits(model) - cut).abs().max() < 1e-5


class TwoWidths(nn.Module):
    """Layer `a` sees three exclusive ors, layer `b` one sign; the head adds what they say."""

    def __init__(self, a: int = 40, b: int = 40) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, a), nn.Linear(6, b), nn.Linear(a + b, 16)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        hidden = torch.cat([self.a(x[:, :6]).relu(), self.b(x[:, 6:]).relu()], dim=1)
        logits = self.head(hidden)
        return SequenceClassifierOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits, labels), logits=logits
        )


def _bits(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 12, generator=generator(seed))
    bits = [x[:, i] * x[:, i + 1] > 0 for i in (0, 2, 4)] + [x[:, 6] > 0]
    return x, sum(bit.long() << place for place, bit in enumerate(bits))


def _train(model: nn.Module, steps: int, pruner: Pruner | None = None) -> nn.Module:
    x, y = _bits(4000, seed=0)
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=1e-2)
    if pruner is not None:
        optimizer = pruner.wrap(optimizer)
        pruner.step(0, steps)
    rows = generator("rows")
    for step in range(1, steps + 1):
        chosen = torch.randint(len(x), (128,), generator=rows)
        batch = {"x": x[chosen], "labels": y[chosen]}
        optimizer.zero_grad()
        (pruner.batch_loss(model, batch) if pruner is not None else model(**batch).loss).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step(step, steps)
    return model


def _accuracy(model: nn.Module) -> float:
    x, y = _bits(4000, seed=1)
    return float((_logits(model, x=x).argmax(1) == y).float().mean())


def test_width_goes_where_it_is_needed() -> None:
    model = TwoWidths()
    pruner = Pruner(
        model,
        DMCPConfig(target_flops=0.4, include=("a", "b"), begin=0.2, end=0.8, alpha_lr=5.0),
        {"x": torch.randn(2, 12)},
    )
    pruner.attach()
    search = pruner.recipe.controller
    _train(model, 600, pruner)
    with torch.no_grad():
        expected = float(search.price(torch.stack([width.expected() for width in search.widths])))
    # The search still swings when it ends: after 600, 700, 800 and 1,000 steps it was at 0.380, 0.394, 0.377 and 0.406.
    assert expected == pytest.approx(0.4, rel=0.08), "the search itself lands near the goal"
    pruner.finalize()
    a, b = model.a.out_features, model.b.out_features
    assert a > 2 * b and a + b == 32, "40 % of 80 units that cost the same"
    torch.manual_seed(1)
    searched, uniform = _train(TwoWidths(a, b), 300), _train(TwoWidths(16, 16), 300)
    assert _accuracy(searched) > _accuracy(uniform) + 0.02


def test_ffn_widths_of_a_text_model() -> None:
    ids = {"input_ids": torch.randint(0, 40, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    pruner = Pruner(tiny_text_model(), DMCPConfig(target_params=0.8), ids)
    pruner.attach()
    assert [gate.function.keep.numel() for gate in pruner.recipe.gates] == [32, 32]
    pruner.step(10, 10)
    assert pruner.sparsity > 0


def test_gradient_checkpointing_is_refused() -> None:
    pruner = Pruner(
        tiny_text_model(),
        DMCPConfig(target_params=0.8),
        {"input_ids": torch.randint(0, 40, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)},
    )
    pruner.attach()
    pruner.step(0, 10)
    pruner.model.train().gradient_checkpointing_enable()
    with pytest.raises(PruneError, match="gradient checkpointing"):
        pruner.batch_loss(pruner.model, {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.tensor([0])})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "needs one goal"),
        ({"final_sparsity": 0.5}, "needs one goal"),
        ({"target_flops": 1.0}, "removes nothing"),
        ({"target_flops": 0.5, "end": 1.0}, "end must be"),
        ({"target_flops": 0.5, "final": "best"}, "final must be one of"),
        ({"target_flops": 0.5, "order": "l2"}, "order must be one of"),
        ({"target_flops": 0.5, "width_step": 0.0}, "width_step must be"),
        ({"target_flops": 0.5, "samples": 0}, "samples must be"),
        ({"target_flops": 0.5, "uniform_share": 0.0}, "uniform_share must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DMCPConfig(**settings)


def test_an_unreachable_goal_leaves_the_model_alone() -> None:
    model = tiny_image_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(PruneError, match="cannot be reached"):
        Pruner(model, DMCPConfig(target_params=0.01), IMAGES).attach()
    assert [type(module) for module in model.modules()] == kinds


def test_a_run_in_prune_trainer(tmp_path: Path) -> None:
    images = torch.randn(16, 3, 17, 17, generator=generator(0))
    rows = Dataset.from_dict({"pixel_values": images, "labels": torch.arange(16) % 3}).with_format("torch")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", disable_tqdm=True, max_grad_norm=0.0, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    pruning = DMCPConfig(target_params=0.5, begin=0.2, end=0.7, final="sampled")
    trainer = PruneTrainer(
        model=tiny_image_model(), args=arguments, train_dataset=rows, pruning=pruning, teacher="self"
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["budget" in entry for entry in logged] == [False, False, False, True, False, False, False, False]
    assert all("distill_logits" in entry for entry in logged)
    assert 0.0 < trainer.report.sparsity < 1.0
