"""Acceptance of the Lookahead spec: exact distortion, invariance to rescaling, order, no side effects, trend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hf_prune
from hf_prune import LookaheadConfig, MagnitudeConfig, PruneConfig, PruneError, Pruner
from hf_prune.graph import trace
from hf_prune.graph.neighbours import Neighbours
from hf_prune.tiny_models import tiny_image_model, tiny_text_model

EVERYTHING = ("*",)


class Chain(nn.Module):
    """Layers one after the other, called by keyword."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _linear(*widths: int, between: Callable[[int], list[nn.Module]] = lambda width: []) -> Chain:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), *between(outputs)]
    return Chain(*layers[: len(layers) - len(between(1))])


def _lookahead(model: nn.Module, config: PruneConfig, x: Tensor) -> Any:
    """The attached method's own object, which scores and selects."""
    pruner = Pruner(model, config, {"x": x})
    pruner.attach()
    return pruner, pruner.recipe.selection.__self__


def _scores(model: nn.Module, x: Tensor, config: PruneConfig | None = None) -> dict[str, Tensor]:
    config = config or LookaheadConfig(final_sparsity=0.5, include=EVERYTHING)
    pruner, lookahead = _lookahead(copy.deepcopy(model), config, x)
    return lookahead.scores(pruner.plan, lookahead.units)


def _keeps(model: nn.Module, config: PruneConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    pruner = Pruner(copy.deepcopy(model), config, inputs, data=[inputs])
    pruner.attach()
    pruner.step(1, 1)
    return {name: keep.clone() for name, keep in pruner.plan.items()}


def _same(left: dict[str, Tensor], right: dict[str, Tensor], names: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(left[name], right[name]) for name in names or left)


def _norm(width: int) -> list[nn.Module]:
    norm = nn.BatchNorm1d(width).eval()
    nn.init.uniform_(norm.weight, -2.0, 2.0)
    nn.init.uniform_(norm.running_var, 0.2, 3.0)
    return [norm]


@pytest.mark.parametrize("between", [lambda width: [], _norm], ids=["plain", "norms"])
def test_score_is_the_change_of_the_product(between: Callable[[int], list[nn.Module]]) -> None:
    model = _linear(4, 5, 6, 3, between=between).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    scores = _scores(model, x)
    place = 1 + len(between(1))
    first, second, third = (model.body[i * place].weight for i in range(3))
    scales = [torch.ones(width, dtype=torch.float64) for width in (5, 6)]
    if between is _norm:
        scales = [n.weight / (n.running_var + n.eps).sqrt() for n in (model.body[1], model.body[3])]
    for i in range(6):
        for j in range(3):
            change = torch.zeros_like(second)
            change[i, j] = second[i, j]
            expected = (third @ torch.diag(scales[1]) @ change @ torch.diag(scales[0]) @ first).square().sum()
            got = scores[f"body.{place}.weight"].view(6, 5)[i, j]
            assert abs(got - expected) <= 1e-10 * (1 + expected)


def test_first_and_last_layer_have_one_neighbour() -> None:
    model = _linear(2, 2, 2).double()
    with torch.no_grad():
        model.body[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 0.5]]))
        model.body[1].weight.copy_(torch.tensor([[2.0, 1.0], [1.0, -1.0]]))
    scores = _scores(model, torch.randn(3, 2, dtype=torch.float64))
    # columns of the second: 4 + 1 and 1 + 1; rows of the first: 1 + 4 and 9 + 0.25
    assert scores["body.0.weight"].tolist() == [5.0, 20.0, 18.0, 0.5]
    assert scores["body.1.weight"].tolist() == [20.0, 9.25, 5.0, 9.25]


def test_a_chain_of_convolutions_is_exact_beside_pointwise_ones() -> None:
    kernels = [nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 4, 3, bias=False, padding=1, padding_mode="circular")]
    model = Chain(*kernels, nn.Conv2d(4, 2, 1, bias=False)).double()
    places = 8
    x = torch.eye(2 * places**2, dtype=torch.float64).view(-1, 2, places, places)  # all columns of the linear map
    scores = _scores(model, x[:3])["body.1.weight"].view(4, 3, 3, 3)
    whole = model(x)
    for index in [(0, 0, 0, 0), (3, 2, 1, 1), (1, 1, 2, 0)]:
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.body[1].weight[index] = 0.0
        assert (whole - without(x)).square().sum().item() / places**2 == pytest.approx(scores[index].item(), rel=1e-10)


def test_a_flattened_map_owns_consecutive_columns() -> None:
    model = Chain(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 9, 2)).double()
    scores = _scores(model, torch.randn(3, 1, 5, 5, dtype=torch.float64))
    conv, head = model.body[0].weight, model.body[3].weight
    columns = head.square().sum(0).view(2, 9).sum(1)
    assert torch.allclose(scores["body.0.weight"].view(2, -1), (conv.square().flatten(1) * columns[:, None]))
    rows = conv.square().flatten(1).sum(1).repeat_interleave(9)
    assert torch.allclose(scores["body.3.weight"].view(2, -1), head.square() * rows)


def test_depthwise_kernels_are_scales_on_the_way() -> None:
    model = Chain(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 2, 1)).double()
    scores = _scores(model, torch.randn(3, 1, 5, 5, dtype=torch.float64))
    before, middle, after = (model.body[i].weight.square() for i in (0, 2, 4))
    rows, own, columns = before.flatten(1).sum(1), middle.flatten(1).sum(1), after.flatten(1).sum(0)
    assert torch.allclose(scores["body.0.weight"], rows * own * columns)
    assert torch.allclose(scores["body.2.weight"].view(3, -1), middle.flatten(1) * (rows * columns)[:, None])
    assert torch.allclose(scores["body.4.weight"].view(2, 3), after.flatten(1) * rows * own)


def test_attention_is_two_chains_and_streams_are_switched() -> None:
    model = tiny_text_model(num_hidden_layers=1).double().eval()
    inputs = {"input_ids": torch.randint(0, 40, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    edges = Neighbours(trace(model, inputs)).edges
    layers = [
        layer.weight.split("layer.0.")[-1].removesuffix(".weight") for layer in Neighbours(trace(model, inputs)).layers
    ]
    found = {(layers[e.writer], layers[e.reader], e.product) for e in edges if e.writer is not None}
    assert found == {
        ("attention.self.query", "attention.self.key", True),
        ("attention.self.key", "attention.self.query", True),
        ("attention.self.value", "attention.output.dense", False),
        ("intermediate.dense", "output.dense", False),
        ("bert.pooler.dense", "classifier", False),
    }
    into_ffn = next(e for e in edges if layers[e.reader] == "intermediate.dense")
    assert [d.tensor for d in into_ffn.diagonals] == ["bert.encoder.layer.0.attention.output.LayerNorm.weight"]
    through = Neighbours(trace(model, inputs), through_streams=True).edges
    assert any(layers[e.writer] == "attention.output.dense" and layers[e.reader] == "intermediate.dense"
               for e in through if e.writer is not None)  # fmt: skip


def test_a_norm_belongs_to_its_own_producer_in_a_block_with_a_shortcut() -> None:
    model = tiny_image_model()
    neighbours = Neighbours(trace(model, {"pixel_values": torch.randn(2, 3, 17, 17)}), through_streams=True)
    for edge in neighbours.edges:
        if edge.writer is not None:
            writer = neighbours.layers[edge.writer].weight.replace("convolution.weight", "normalization.weight")
            assert [d.tensor for d in edge.diagonals] == [writer]


def test_rescaling_units_changes_magnitude_alone() -> None:
    model = Chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    inputs = {"x": torch.randn(5, 6, dtype=torch.float64)}
    scaled = copy.deepcopy(model)
    factors = torch.exp(2 * torch.randn(16, dtype=torch.float64))
    with torch.no_grad():
        scaled.body[0].weight *= factors[:, None]
        scaled.body[0].bias *= factors
        scaled.body[2].weight /= factors
    assert torch.allclose(model(**inputs), scaled(**inputs))
    lookahead = LookaheadConfig(final_sparsity=0.6, include=EVERYTHING)
    # Only in these two: the layer after them looks at rows that were divided by different factors.
    scaled_ones = ("body.0.weight", "body.2.weight")
    assert _same(_keeps(model, lookahead, inputs), _keeps(scaled, lookahead, inputs), scaled_ones)
    magnitude = MagnitudeConfig(final_sparsity=0.6, include=EVERYTHING, scope="per_group")
    for name in scaled_ones:
        assert not _same(_keeps(model, magnitude, inputs), _keeps(scaled, magnitude, inputs), (name,))


def test_rescaling_through_a_norm_changes_nothing() -> None:
    model = _linear(6, 16, 12, 4, between=_norm).double().eval()
    inputs, config = (
        {"x": torch.randn(5, 6, dtype=torch.float64)},
        LookaheadConfig(final_sparsity=0.6, include=EVERYTHING),
    )
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        factors = torch.exp(torch.randn(16, dtype=torch.float64))
        scaled.body[1].weight *= factors
        scaled.body[1].bias *= factors
        scaled.body[2].weight /= factors
    assert _same(_keeps(model, config, inputs), _keeps(scaled, config, inputs), ("body.0.weight", "body.2.weight"))


@pytest.mark.parametrize("scope", ["global", "per_group"])
def test_a_layer_scaled_by_100_ruins_magnitude_alone(scope: str) -> None:
    model = tiny_text_model().double().eval()
    inputs = {"input_ids": torch.randint(0, 40, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    scaled = copy.deepcopy(model)
    block = scaled.bert.encoder.layer[0].attention
    with torch.no_grad():
        block.self.value.weight *= 100
        block.self.value.bias *= 100
        block.output.dense.weight /= 100
    assert torch.allclose(model(**inputs).logits, scaled(**inputs).logits)
    lookahead = LookaheadConfig(final_sparsity=0.6, scope=scope)
    assert _same(_keeps(model, lookahead, inputs), _keeps(scaled, lookahead, inputs))
    if scope == "global":
        keeps = _keeps(scaled, MagnitudeConfig(final_sparsity=0.6), inputs)
        assert int(keeps["bert.encoder.layer.0.attention.output.dense.weight"].sum()) == 1  # what a floor leaves


def test_less_distortion_than_magnitude_where_units_differ_in_scale() -> None:
    distortions: dict[str, list[float]] = {"lookahead": [], "magnitude": []}
    for seed in range(20):
        torch.manual_seed(seed)
        model = _linear(32, 64, 64, 10).double()
        with torch.no_grad():
            for layer in model.body:
                layer.weight.normal_()
                layer.weight *= torch.exp(0.7 * torch.randn(len(layer.weight), dtype=torch.float64))[:, None]
        x = torch.eye(32, dtype=torch.float64)
        dense = model(x).detach()
        for method, kind in (("lookahead", LookaheadConfig), ("magnitude", MagnitudeConfig)):
            pruned = copy.deepcopy(model)
            hf_prune.prune(pruned, kind(final_sparsity=0.8, include=("body.1",)), {"x": x})
            distortions[method].append(float((pruned(x).detach() - dense).norm() / dense.norm()))
    ours, theirs = (torch.tensor(distortions[name]) for name in ("lookahead", "magnitude"))
    assert (ours < theirs).all()
    assert ours.mean() < 0.7 * theirs.mean()


def _half_dead(reverse: bool) -> Chain:
    """A layer of which everything else than one unit survives pruning: the unit's own weights are tiny."""
    model = _linear(8, 8, 8).double()
    with torch.no_grad():
        for layer in model.body:
            layer.weight.uniform_(1.0, 2.0)
        (model.body[1].weight[:, 3] if reverse else model.body[0].weight[3]).fill_(1e-3)
    return model


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_in_order_a_unit_that_a_neighbour_lost_scores_zero(order: str) -> None:
    reverse = order == "backward"
    model, x = _half_dead(reverse), torch.randn(3, 8, dtype=torch.float64)
    config = LookaheadConfig(final_sparsity=1 / 8, include=EVERYTHING, order=order)
    pruner, lookahead = _lookahead(model, config, x)
    first, second = ("body.1.weight", "body.0.weight") if reverse else ("body.0.weight", "body.1.weight")
    plan = pruner.plan
    together = lookahead.scores(plan, lookahead.units)[second].view(8, 8)
    plan = lookahead.select({}, 1.0)
    gone = ~plan[first].view(8, 8)
    assert (gone[:, 3] if reverse else gone[3]).all() and gone.sum() == 8
    chosen = ~plan[second].view(8, 8)
    assert (chosen[3] if reverse else chosen[:, 3]).all(), "it is what goes first in the second layer"
    assert (together > 0).all()


@pytest.mark.parametrize("order", ["together", "forward", "backward"])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_end_at_the_same_count(order: str, splits: int) -> None:
    model, x = _linear(7, 9, 11, 5).double(), torch.randn(3, 7, dtype=torch.float64)
    config = LookaheadConfig(final_sparsity=0.7, include=EVERYTHING, order=order, splits=splits)
    keeps = _keeps(model, config, {"x": x})
    assert [int(keep.sum()) for keep in keeps.values()] == [int(0.3 * n + 1e-6) for n in (63, 99, 55)]


def test_rounds_take_nothing_back() -> None:
    model, x = _linear(7, 9, 11, 5).double(), torch.randn(3, 7, dtype=torch.float64)
    pruner, _ = _lookahead(model, LookaheadConfig(final_sparsity=0.8, include=EVERYTHING, rounds=4), x)
    before = None
    for step in range(9):
        pruner.step(step, 8)
        now = {name: keep.clone() for name, keep in pruner.plan.items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()  # as training may: what is gone would rank high
        assert before is None or all(bool((keep <= before[name]).all()) for name, keep in now.items())
        before = now
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)


def test_scoring_leaves_the_model_alone() -> None:
    model = Chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    before = copy.deepcopy(model.state_dict())
    batch = {"x": torch.randn(5, 6)}
    pruner = Pruner(
        model, LookaheadConfig(final_sparsity=0.5, activations=True, include=EVERYTHING), batch, data=[batch]
    )
    pruner.attach()
    lookahead = pruner.recipe.selection.__self__
    lookahead.measure(pruner.calibration)
    lookahead.scores(pruner.plan, lookahead.units)
    for name, value in before.items():
        now = model.state_dict()
        assert torch.equal(value, now.get(name, now.get(name.replace("weight", "parametrizations.weight.original"))))


def test_activation_rates_by_hand() -> None:
    model = Chain(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model.body[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model.body[2].weight.copy_(torch.tensor([[2.0, 2.0]]))
    data = {"x": torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)}
    config = LookaheadConfig(final_sparsity=0.5, activations=True, include=EVERYTHING)
    pruner = Pruner(model, config, data, data=[data])
    pruner.attach()
    lookahead = pruner.recipe.selection.__self__
    lookahead.measure(pruner.calibration)
    scores = lookahead.scores(pruner.plan, lookahead.units)  # active in 3 and in 1 of 4 rows
    assert scores["body.0.weight"].tolist() == [4 * 0.75, 0.0, 0.0, 4 * 0.25]
    assert scores["body.2.weight"].tolist() == [4 * 0.75, 4 * 0.25]


def test_units_of_a_group_count_by_what_they_carry() -> None:
    model = Chain(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    scores = _scores(
        model, torch.randn(4, 5, dtype=torch.float64), LookaheadConfig(target_params=0.7, scope="per_group")
    )
    rows, columns = model.body[0].weight.square().sum(1), model.body[2].weight.square().sum(0)
    assert torch.allclose(scores["body.0"], rows * columns)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def _train(model: nn.Module, x: Tensor, y: Tensor, steps: int, keeps: dict[str, Tensor] | None = None) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        for name, keep in (keeps or {}).items():
            weight = model.get_parameter(name)
            weight.data *= keep.view_as(weight)


@pytest.mark.slow
def test_no_worse_than_magnitude_after_training_on() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
    errors: dict[tuple[str, float], list[float]] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        widths = [64, 100, 100, 100, 10]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
        dense = Chain(*layers)
        _train(dense, *train, 250)
        for kept in (0.06, 0.03, 0.015):
            configs = {
                "lookahead": LookaheadConfig(final_sparsity=1 - kept, include=EVERYTHING),
                "activations": LookaheadConfig(final_sparsity=1 - kept, include=EVERYTHING, activations=True),
                "magnitude": MagnitudeConfig(final_sparsity=1 - kept, include=EVERYTHING, scope="per_group"),
            }
            for name, config in configs.items():
                keeps, pruned = _keeps(dense, config, {"x": train[0][:256]}), copy.deepcopy(dense)
                for weight, keep in keeps.items():
                    pruned.get_parameter(weight).data *= keep.view_as(pruned.get_parameter(weight))
                _train(pruned, *train, 250, keeps)
                errors.setdefault((name, kept), []).append(1 - _accuracy(pruned, *test))
    mean = {key: sum(values) / len(values) for key, values in errors.items()}
    for kept in (0.06, 0.03, 0.015):
        assert mean["lookahead", kept] <= mean["magnitude", kept]
    gaps = [mean["magnitude", kept] - mean["lookahead", kept] for kept in (0.06, 0.03, 0.015)]
    assert gaps[0] < gaps[-1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"target_params": 0.5, "order": "forward"}, "masks layer by layer"),
        ({"final_sparsity": 0.5, "order": "backward", "scope": "global"}, "masks layer by layer"),
        ({"final_sparsity": 0.5, "order": "sideways"}, "order must be one of"),
        ({"final_sparsity": 0.5, "splits": 0}, "splits must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LookaheadConfig(**settings)


def test_activation_rates_need_data() -> None:
    model = Chain(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(PruneError, match="measures its scores on data"):
        hf_prune.prune(model, LookaheadConfig(final_sparsity=0.5, activations=True), {"x": torch.randn(5, 6)})
