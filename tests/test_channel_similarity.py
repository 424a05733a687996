"""Acceptance of the channel-similarity spec: planted copies, moment formulae, nested budgets, accuracy kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fitting import accuracy, fit
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hf_prune
from hf_prune import ChannelSimilarityConfig, MagnitudeConfig, PruneConfig, PruneError, Pruner
from hf_prune.graph import trace
from hf_prune.methods.channel_similarity import absorb
from hf_prune.parts.moments import distance, gaussian, rectified
from hf_prune.tiny_models import tiny_image_model, tiny_text_model


class Net(nn.Module):
    """Two convolutions with norms and a head, called by keyword."""

    def __init__(self, width: int = 8, padding: int = 1, hidden: int = 12) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, width, 3, padding=padding, bias=False), nn.BatchNorm2d(width)
        self.second, self.after = nn.Conv2d(width, hidden, 3, padding=padding, bias=False), nn.BatchNorm2d(hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(pixel_values)))
        return self.head(torch.relu(self.after(self.second(x))).mean((2, 3)))


@torch.no_grad()
def _scrambled(width: int = 8, padding: int = 1) -> Net:
    model = Net(width, padding).double().eval()
    for norm in (model.norm, model.after):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.5)
    return model


@torch.no_grad()
def _with_copies(model: Net, scale: float = 1.0, cosine: float = 1.0) -> Net:
    """Every channel of the first layer twice, in random order; the second one `scale` times as large."""
    wide, width = copy.deepcopy(model), len(model.first.weight)
    order = torch.randperm(2 * width)
    source = torch.arange(2 * width)[order] % width
    factors = torch.where(torch.arange(2 * width)[order] < width, 1.0, scale).to(model.first.weight)
    wide.first = nn.Conv2d(1, 2 * width, 3, padding=model.first.padding, bias=False).to(model.first.weight)
    filters = model.first.weight[source]
    noise = torch.randn_like(filters)
    along = (noise * filters).flatten(1).sum(1) / filters.flatten(1).square().sum(1)
    noise -= along[:, None, None, None] * filters
    noise *= (filters.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))[:, None, None, None]
    wide.first.weight.copy_(cosine * filters + (1 - cosine**2) ** 0.5 * noise)
    wide.norm = nn.BatchNorm2d(2 * width).to(model.first.weight).eval()
    for name in ("running_mean", "running_var"):
        getattr(wide.norm, name).copy_(getattr(model.norm, name)[source])
    wide.norm.weight.copy_(model.norm.weight[source] * factors)
    wide.norm.bias.copy_(model.norm.bias[source] * factors)
    wide.second = nn.Conv2d(2 * width, 12, 3, padding=model.second.padding, bias=False).to(model.first.weight)
    share = torch.rand(width).to(model.first.weight)
    first = torch.arange(2 * width)[order] < width
    parts = torch.where(first, share[source], 1 - share[source]) / factors
    wide.second.weight.copy_(model.second.weight[:, source] * parts[:, None, None])
    wide.pairs = source
    return wide


def _prune(model: nn.Module, config: PruneConfig, images: Tensor) -> tuple[nn.Module, list[int]]:
    batches = [{"pixel_values": images}]
    pruned, report = hf_prune.prune(copy.deepcopy(model), config, {"pixel_values": images[:2]}, data=batches)
    return pruned, report.layers["first"]["indices"]


FIRST = {"include": ("first",), "scope": "per_group"}


@pytest.mark.parametrize("correlation", ["filter", "empirical"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("padding", [0, 1])
def test_one_of_each_pair_of_copies_stays_and_takes_over(correlation: str, scale: float, padding: int) -> None:
    model = _with_copies(_scrambled(padding=padding), scale)
    images = torch.randn(16, 1, 12, 12, dtype=torch.float64)
    near = trace(model, {"pixel_values": images[:2]}).groups["first"]
    assert near.size == 16
    if scale != 1.0:  # twice as large is no copy by distance, but merges exactly where it is chosen
        pruned = _forced_pairs(model, images, correlation)
    else:
        config = ChannelSimilarityConfig(target_units=0.5, correlation=correlation, **FIRST)
        pruned, kept = _prune(model, config, images)
        assert sorted(model.pairs[kept].tolist()) == list(range(8))
    assert (pruned(images) - model(images)).abs().max() <= 1e-5


def _forced_pairs(model: Net, images: Tensor, correlation: str) -> nn.Module:
    """Prune with trees that pair every channel with its copy, whatever their distance."""
    pruner = Pruner(
        copy.deepcopy(model), ChannelSimilarityConfig(target_units=0.5, correlation=correlation, **FIRST),
        {"pixel_values": images[:2]}, data=[{"pixel_values": images}],
    )  # fmt: skip
    pruner.attach()
    merging = pruner.recipe.selection.__self__
    measured = pruner.recipe.measured_scores

    def paired(calibration: Any) -> dict[str, Tensor]:
        measured(calibration)
        pairs = model.pairs.tolist()
        kept = [pairs.index(pair) for pair in range(8)]
        merging.by["first"] = [kept[pair] for pair in pairs]
        return {"first": torch.tensor([float(channel in kept) for channel in range(16)])}

    pruner.recipe.measured_scores = paired
    pruner.step(1, 1)
    pruner.finalize()
    return pruner.model


@pytest.mark.parametrize("correlation", ["independent", "distribution"])
def test_other_readings_do_not_see_copies(correlation: str) -> None:
    model = _with_copies(_scrambled())
    with torch.no_grad():  # norms alike: only filters tell channels apart
        model.norm.weight.fill_(1.0)
        model.norm.bias.fill_(0.2)
    config = ChannelSimilarityConfig(target_units=0.5, correlation=correlation, **FIRST)
    _, kept = _prune(model, config, torch.randn(16, 1, 12, 12, dtype=torch.float64))
    assert sorted(model.pairs[kept].tolist()) != list(range(8))


def test_without_repair_the_output_changes() -> None:
    model = _with_copies(_scrambled())
    images = torch.randn(16, 1, 12, 12, dtype=torch.float64)
    pruned, _ = _prune(model, ChannelSimilarityConfig(target_units=0.5, repair="none", **FIRST), images)
    assert (pruned(images) - model(images)).abs().max() > 1e-3


def test_offsets_go_to_the_norm_behind_the_reader() -> None:
    """Y_j ~ a Y_i + c is the least-squares line, and c ends in the running mean."""
    model = _scrambled(padding=0)
    images = torch.randn(64, 1, 12, 12, dtype=torch.float64)
    gaps = []
    for repair in ("merge", "none"):
        config = ChannelSimilarityConfig(target_units=0.75, correlation="empirical", repair=repair, **FIRST)
        pruned, _ = _prune(model, config, images)
        gaps.append(float((pruned(images) - model(images)).square().mean().detach()))
    assert gaps[0] < 0.5 * gaps[1]


def test_moments_agree_with_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    beta = torch.tensor([0.3, -0.8, 1.2, 0.0], dtype=torch.float64)
    gamma = torch.tensor([1.0, -0.7, 0.4, 2.0], dtype=torch.float64)
    mix = F.normalize(torch.randn(4, 4, generator=generator, dtype=torch.float64), dim=1)
    rho = mix @ mix.T
    draws = torch.randn(400_000, 4, generator=generator, dtype=torch.float64) @ mix.T * gamma + beta
    for moments, values in ((gaussian(beta, gamma, rho), draws), (rectified(beta, gamma, rho), draws.relu())):
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - moments.mean).abs() <= 3.5 * error).all()
        products = values[:, :, None] * values[:, None, :]
        error = products.std(0) / len(values) ** 0.5
        assert ((products.mean(0) - moments.second).abs() <= 3.5 * error).all()


def test_centred_channels_have_the_arc_cosine_kernel() -> None:
    gamma = torch.tensor([1.5, -0.5], dtype=torch.float64)
    for rho in (-0.9, 0.0, 0.4, 0.95):
        matrix = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
        angle = torch.arccos(torch.tensor(-rho, dtype=torch.float64))  # gamma of other signs turns it
        expected = 0.75 * (torch.sin(angle) + (torch.pi - angle) * torch.cos(angle)) / (2 * torch.pi)
        assert float(rectified(torch.zeros(2).double(), gamma, matrix).second[0, 1]) == pytest.approx(
            float(expected), abs=1e-6
        )


def test_distance_by_hand_and_under_permutation() -> None:
    beta, gamma = torch.tensor([1.0, 1.0, -1.0]).double(), torch.tensor([2.0, 2.0, 1.0]).double()
    rho = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]]).double()
    near = distance(gaussian(beta, gamma, rho))
    # (1 + 1)^2 + 4 + 1 - 2 * 0.5 * 2 * 1 = 7 over (1 + 4) + (1 + 1) = 7
    assert near.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    assert distance(rectified(beta, gamma, rho))[0, 1] < 1e-6
    order = torch.tensor([2, 0, 1])
    shuffled = distance(rectified(beta[order], gamma[order], rho[order][:, order]))
    assert torch.allclose(shuffled, distance(rectified(beta, gamma, rho))[order][:, order], atol=1e-9)
    zeros, signs = torch.zeros(2).double(), torch.tensor([1.0, -1.0]).double()
    opposite = distance(rectified(zeros, signs, torch.ones(2, 2).double()))
    assert opposite[0, 1] == pytest.approx(1.0, abs=1e-6), "the negative of a channel is no copy after ReLU"
    assert distance(gaussian(zeros, zeros, torch.eye(2).double()))[0, 1] == 0.0, "two silent channels are alike"


def test_trees_by_hand() -> None:
    places = torch.tensor([0.0, 1.0, 1.5, 10.0, 10.1], dtype=torch.float64)
    near = (places[:, None] - places).square()
    heights, by = absorb(near, torch.ones(5), "average")
    # 3 and 4 at 0.1, then 1 and 2 at 0.5, then 0 with {1, 2} at 1.25, then the rest
    assert heights[[2, 0]].tolist() == pytest.approx([0.5, 1.25]) or heights[[1, 0]].tolist() == pytest.approx(
        [0.5, 1.25]
    )
    assert sorted(heights.tolist())[0] == pytest.approx(0.1) and int(heights.isinf().sum()) == 1
    assert by[0] in (1, 2) and {by[3], by[4]} & {3, 4}
    heights, by = absorb(near, torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0]), "complete")
    assert by[3] == 4, "of two as near to the rest the stronger one stays"


def test_budgets_are_met_and_nested() -> None:
    model = tiny_image_model(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2]).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 17, 17)}
    graph = trace(model, inputs)
    dense, before = graph.price().multiply_adds, None
    for kept in (0.9, 0.7, 0.5):
        pruner = Pruner(copy.deepcopy(model), ChannelSimilarityConfig(target_flops=kept), inputs)
        pruner.attach()
        pruner.step(1, 1)
        plan = pruner.plan
        assert kept - 0.02 <= graph.price(plan).multiply_adds / dense <= kept
        assert before is None or all(bool((keep <= before[name]).all()) for name, keep in plan.items())
        before = {name: keep.clone() for name, keep in plan.items()}


def test_neurons_of_a_transformer_by_what_the_next_layer_reads() -> None:
    model = tiny_text_model(hidden_act="relu").eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[1::2] = layer.intermediate.dense.weight[::2]
            layer.intermediate.dense.bias[1::2] = layer.intermediate.dense.bias[::2]
    ids = torch.randint(0, 40, (8, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = model(**batch).logits
    config = ChannelSimilarityConfig(
        target_units=0.5, correlation="empirical", scope="per_group", include=("*.intermediate.*",)
    )
    pruned, report = hf_prune.prune(model, config, batch, data=[batch])
    for layer in report.layers.values():
        assert sorted(index // 2 for index in layer["indices"]) == list(range(16))
    assert (pruned(**batch).logits - before).abs().max() <= 1e-5


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def test_near_copies_of_equal_size_go_without_loss_where_l1_and_chance_lose() -> None:
    train, test = _digits()
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.first.weight /= model.first.weight.flatten(1).norm(dim=1)[:, None, None, None]
    wide = _with_copies(fit(model, train, 250), cosine=0.9995)
    with torch.no_grad():  # the norm takes over the size of the filters: all are equal
        sizes = wide.first.weight.flatten(1).norm(dim=1)
        wide.first.weight /= sizes[:, None, None, None]
        wide.norm.running_mean /= sizes
        wide.norm.running_var /= sizes.square()
    dense = accuracy(wide, test)
    config = ChannelSimilarityConfig(target_units=0.5, correlation="empirical", **FIRST)
    ours = accuracy(_prune(wide, config, train[0][:256])[0], test)
    assert dense > 80.0 and ours >= dense - 1.0
    for score in ("l1", "random"):
        config = MagnitudeConfig(target_units=0.5, score=score, **FIRST)
        assert accuracy(_prune(wide, config, train[0][:2])[0], test) <= dense - 10.0


@pytest.mark.slow
def test_tuned_it_is_not_below_the_dense_model() -> None:
    train, test = _digits()
    changes = []
    for seed in range(3):
        torch.manual_seed(seed)
        dense = fit(Net(24, hidden=48), train, 250)
        pruned, _ = _prune(dense, ChannelSimilarityConfig(target_flops=0.7), train[0][:2])
        longer = fit(copy.deepcopy(dense), train, 250)
        changes.append(accuracy(fit(pruned, train, 250), test) - accuracy(longer, test))
    assert sum(changes) / 3 >= -0.5


def test_measured_readings_need_data() -> None:
    with pytest.raises(PruneError, match="measures its scores on data"):
        hf_prune.prune(
            tiny_image_model(), ChannelSimilarityConfig(target_units=0.5, correlation="empirical"),
            {"pixel_values": torch.randn(2, 3, 17, 17)},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"final_sparsity": 0.5}, "does not go with"),
        ({"target_units": 0.5, "correlation": "cosine"}, "correlation must be one of"),
        ({"target_units": 0.5, "linkage": "ward"}, "linkage must be one of"),
        ({"target_units": 0.5, "repair": "yes"}, "repair must be one of"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ChannelSimilarityConfig(**settings)
