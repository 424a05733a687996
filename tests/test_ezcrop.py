"""Acceptance of the EZCrop spec: spectra by hand, invariances, batches, planted filters, order, passes."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fitting import accuracy, fit
from torch import Tensor, nn

import hf_prune
from hf_prune import EZCropConfig, MagnitudeConfig, PruneConfig, PruneError, Pruner
from hf_prune.methods.ezcrop import energy_outside, half_width
from hf_prune.tiny_models import tiny_image_model, tiny_text_model


def _score(image: Tensor, alpha: float = 0.25) -> float:
    return float(energy_outside(image[None, None].double(), alpha))


def _shifted(image: Tensor, alpha: float = 0.25) -> float:
    """The score as its definition reads, over the whole shifted spectrum."""
    size = torch.tensor(image.shape)
    centre = size // 2
    zone = half_width(*image.shape, alpha)
    spectrum = torch.fft.fftshift(torch.fft.fft2(image.double())).abs().log1p()
    rows, columns = (slice(int(c) - zone, int(c) + zone + 1) for c in centre)
    return 1.0 - float(spectrum[rows, columns].sum() / spectrum.sum())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, 2, 3), 0), ((4, 5, 7, 8), 1), ((14, 16), 2), ((28, 32), 4), ((56,), 7)],
)
def test_half_widths(sizes: tuple[int, ...], expected: int) -> None:
    assert [half_width(size, size, 0.25) for size in sizes] == [expected] * len(sizes)


def test_scores_by_hand() -> None:
    assert _score(torch.ones(32, 32)) == pytest.approx(0.0, abs=1e-5)
    for size, expected in ((32, 1 - 81 / 1024), (8, 1 - 9 / 64)):
        impulse = torch.zeros(size, size)
        impulse[2, 3] = 7.0
        assert _score(impulse) == pytest.approx(expected, abs=1e-5)
    places = torch.arange(32, dtype=torch.float64) / 32 * 2 * torch.pi
    low, high = (torch.cos(k * places).expand(32, 32) for k in (2, 13))
    assert _score(low) == pytest.approx(0.0, abs=1e-5)
    assert _score(high) == pytest.approx(1.0, abs=1e-5)
    assert _score(low + high) == pytest.approx(0.5, abs=1e-5)
    assert _score(torch.zeros(8, 8)) == 0.0


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (8, 7), (5, 12), (3, 3), (1, 1), (2, 9)])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.6, 1.0])
def test_half_a_spectrum_says_what_the_whole_says(shape: tuple[int, int], alpha: float) -> None:
    image = torch.randn(*shape)
    assert _score(image, alpha) == pytest.approx(_shifted(image, alpha), abs=1e-9)


def test_shifts_flips_turns_and_signs_change_nothing_but_scale_does() -> None:
    image = torch.randn(16, 16)
    score = _score(image)
    for other in (image.roll((3, 5), (0, 1)), image.flip(0), image.flip(1), image.T, -image):
        assert _score(other) == pytest.approx(score, abs=1e-6)
    assert abs(_score(100 * image) - score) > 1e-4


def test_it_is_no_rank() -> None:
    axis = torch.arange(32.0) - 16
    bump = torch.exp(-(axis**2) / 32)
    bump, impulse = torch.outer(bump, bump), torch.zeros(32, 32)
    impulse[4, 4] = 1.0
    assert torch.linalg.matrix_rank(bump) == torch.linalg.matrix_rank(impulse) == 1
    assert _score(bump) < 0.01 < 0.9 < _score(impulse)


def test_half_precision_maps_are_transformed_in_single() -> None:
    image = torch.randn(1, 1, 32, 32).half() * 200
    assert energy_outside(image, 0.25).isfinite().all()


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.body(pixel_values)


def _scores(model: nn.Module, batches: list[dict[str, Tensor]], config: PruneConfig) -> dict[str, Tensor]:
    pruner = Pruner(model.eval(), config, {"pixel_values": batches[0]["pixel_values"][:2]}, data=batches)
    pruner.attach()
    return pruner.recipe.measured_scores(pruner.calibration)


@pytest.mark.parametrize("feature_map", ["written", "read"])
def test_any_split_into_batches_gives_the_same_scores(feature_map: str) -> None:
    images = torch.randn(60, 3, 16, 16)
    config = EZCropConfig(target_params=0.7, calibration_batches=4, feature_map=feature_map, residual=True)
    whole = _scores(tiny_image_model(), [{"pixel_values": images}], config)
    split = _scores(tiny_image_model(), [{"pixel_values": part} for part in images.split(16)], config)
    for name, score in whole.items():
        assert (score - split[name]).abs().max() < 1e-6


def _smooth_and_rough(width: int = 16) -> tuple[Net, Tensor]:
    """A layer of which half the filters are boxes, all outputs of equal variance; which ones are rough."""
    rough = torch.randperm(width) < width // 2
    model = Net(nn.Conv2d(1, width, 3, bias=False), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 1, 16, 16))
    filters = torch.where(rough[:, None, None, None], torch.randn(width, 1, 3, 3), torch.ones(width, 1, 3, 3))
    model.body[0].weight.data = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
    return model, rough


def test_smooth_channels_go_and_random_choice_does_not_see_them() -> None:
    model, rough = _smooth_and_rough()
    batches = [{"pixel_values": torch.randn(64, 1, 16, 16)}]
    example = {"pixel_values": batches[0]["pixel_values"][:2]}
    config = EZCropConfig(target_units=0.5, feature_map="read", include=("body.0",))
    _, report = hf_prune.prune(copy.deepcopy(model), config, example, data=batches)
    assert report.layers["body.0"]["indices"] == rough.nonzero().flatten().tolist()
    other = MagnitudeConfig(target_units=0.5, score="random", include=("body.0",))
    _, report = hf_prune.prune(copy.deepcopy(model), other, example)
    assert report.layers["body.0"]["indices"] != rough.nonzero().flatten().tolist()


def test_maps_without_a_spectrum_fall_back_to_sizes() -> None:
    model = Net(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.ReLU(),
                nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 2))  # fmt: skip
    batches = [{"pixel_values": torch.randn(8, 2, 9, 9)}]
    with pytest.warns(UserWarning, match=r"body\.3.*scored by L1"):
        scores = _scores(model, batches, EZCropConfig(target_units=0.5))
    assert torch.allclose(scores["body.3"], model.body[3].weight.abs().flatten(1).mean(1))
    assert (scores["body.0"] > 0.5).all()


def test_repeated_passes_look_again_and_take_nothing_back() -> None:
    model = tiny_image_model()
    batches = [{"pixel_values": torch.randn(8, 3, 16, 16)}]
    pruner = Pruner(
        model, EZCropConfig(target_units=0.4, rounds=3), {"pixel_values": torch.randn(2, 3, 17, 17)}, data=batches
    )
    pruner.attach()
    counts, before = [], None
    for step in range(10):
        pruner.step(step, 9)
        now = {name: keep.clone() for name, keep in pruner.plan.items()}
        counts.append(sum(int(keep.sum()) for keep in now.values()))
        assert before is None or all(bool((keep <= before[name]).all()) for name, keep in now.items())
        before = now
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    assert len(set(counts)) == 3 and counts == sorted(counts, reverse=True)


def test_it_is_faster_than_a_rank() -> None:
    maps = torch.randn(16, 32, 32, 32)
    energy_outside(maps, 0.25)
    seconds = []
    for function in (lambda: energy_outside(maps, 0.25), lambda: torch.linalg.matrix_rank(maps)):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    assert 2 * seconds[0] < seconds[1]


def test_models_without_maps_are_refused() -> None:
    model = tiny_text_model()
    with pytest.raises(PruneError, match="2-D convolutions"):
        hf_prune.prune(model, EZCropConfig(target_params=0.7), data=[])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"final_sparsity": 0.5}, "does not go with final_sparsity"),
        ({"target_params": 0.5, "scope": "global"}, "scope must be"),
        ({"target_params": 0.5, "alpha": 1.5}, "alpha must be"),
        ({"target_params": 0.5, "feature_map": "after"}, "feature_map must be one of"),
    ],
)
def test_bad_settings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EZCropConfig(**settings)


def _textures(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of one of four fine textures at a random place, under smooth shading and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (rows,), generator=generator)
    grid = torch.arange(16.0)
    waves = torch.tensor([[5.0, 0.0], [0.0, 5.0], [4.0, 4.0], [4.0, -4.0]])[labels] * 2 * torch.pi / 16
    phase = 6.3 * torch.rand(rows, 1, 1, generator=generator)
    textures = torch.cos(waves[:, 0, None, None] * grid[:, None] + waves[:, 1, None, None] * grid + phase)
    shade = F.interpolate(torch.randn(rows, 1, 3, 3, generator=generator), 16, mode="bilinear")
    return 0.6 * textures[:, None] + 2 * shade + 0.8 * torch.randn(rows, 1, 16, 16, generator=generator), labels


def _trained(seed: int, images: Tensor, labels: Tensor, model: nn.Module | None = None, steps: int = 120) -> nn.Module:
    torch.manual_seed(seed)
    block = lambda a, b: [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]  # noqa: E731
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
    model = model or Net(*block(1, 12), *block(12, 12), nn.AvgPool2d(2), *block(12, 12), *block(12, 12), *head)
    return fit(model, (images, labels), steps)


@pytest.mark.slow
def test_better_than_its_reverse_before_tuning_and_no_worse_in_three_passes() -> None:
    images, labels = _textures(1500, 0)
    test = _textures(800, 1)
    example, data = {"pixel_values": images[:2]}, [{"pixel_values": part} for part in images[:320].split(64)]
    config = EZCropConfig(target_flops=0.6, feature_map="read")
    gains, passes = [], []
    for seed in range(3):
        dense = _trained(seed, images, labels)
        ours = hf_prune.prune(copy.deepcopy(dense), config, example, data=data)[0]
        pruner = Pruner(copy.deepcopy(dense), config, example, data=data)
        pruner.attach()
        measure = pruner.recipe.measured_scores
        pruner.recipe.measured_scores = lambda data, measure=measure: {n: -s for n, s in measure(data).items()}
        pruner.step(1, 1)
        pruner.finalize()
        gains.append(accuracy(ours, test) - accuracy(pruner.model, test))
        once = _trained(seed, images, labels, ours, 120)
        thrice = copy.deepcopy(dense)
        for kept in (0.6 ** (1 / 3),) * 3:
            again = EZCropConfig(target_flops=kept, feature_map="read")
            thrice = _trained(seed, images, labels, hf_prune.prune(thrice, again, example, data=data)[0], 40)
        passes.append(accuracy(thrice, test) - accuracy(once, test))
    assert sum(gains) / 3 >= 5.0
    assert sum(passes) / 3 >= 0.0
