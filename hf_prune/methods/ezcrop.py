"""EZCrop: channels whose maps hold little beyond low frequencies go first (Lin et al. 2022, arXiv 2105.03679).

Idea      the share of a feature map's spectrum outside its central zone hardly depends on the image and says what the
          rank of the map says, at the price of a fast Fourier transform in place of a singular value decomposition.
Equations 1 - sum of log(1 + |FFT|) inside the zone over the same of the whole, averaged over images; half-width of the
          zone: min over both sides of ceil(alpha * (size - 1 - centre)) -> `energy_outside`; the best of each layer
          stay; repeated on the tuned model -> `rounds`.
Differs   Read from the authors' code. They give each layer's fraction by hand; here it is the same for all, as the goal
          needs. In ResNets their branch for convolution outputs scores every layer by the stem, and each block output
          chooses channels of its own; here every layer is scored by itself, and the layers that add into a stream share
          one choice by their mean (`members="max"`: their best). The centre is size // 2 on each side. A layer of 1 x 1
          maps has no spectrum and falls back to L1, with a warning. Maps of 2-D convolutions only, channels first.
Related   `magnitude` is L1; a rank by singular values (HRank) is what the benchmark compares with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range
from hf_prune.parts import schedules, targets
from hf_prune.parts.channel_gates import ChannelTarget, channel_targets
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.scores import unit_norms
from hf_prune.parts.selection import lasting
from hf_prune.parts.statistics import Calibration, Point, gather, widest
from hf_prune.types import Paper, PruneError

PAPER = Paper(
    title="EZCrop: Energy-Zoned Channels for Robust Output Pruning",
    authors="Rui Lin, Jie Ran, Dongpeng Wang, King Hung Chiu, Ngai Wong",
    year=2022,
    arxiv="2105.03679",
    status="reconstruction",
    bibtex="""@inproceedings{lin2022ezcrop,
  title     = {{EZCrop}: Energy-Zoned Channels for Robust Output Pruning},
  author    = {Lin, Rui and Ran, Jie and Wang, Dongpeng and Chiu, King Hung and Wong, Ngai},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision},
  year      = {2022}
}""",
)
NEEDS_TRAINING = False
GOALS = targets.COUNTED
TINY_MODEL = "image"


@dataclass(frozen=True)
class EZCropConfig(PruneConfig):
    """Defaults are the authors': 5 batches, a quarter of the spectrum's half, convolution outputs, one pass."""

    method = "ezcrop"
    rounds_widths = True

    structure: str = "group"
    scope: str = "per_group"
    alpha: float = 0.25  # half-width of the zone as a share of the spectrum's half, in [0, 1]
    feature_map: str = "written"  # "written": what the convolution gives; "read": what the next one takes in
    members: str = "mean"  # score of a stream from its layers' scores: "mean" or "max"
    residual: bool = False  # also prune residual streams
    calibration_batches: int = 5  # batches that maps are looked at on
    rounds: int = 1  # passes of scoring and pruning between begin and end of a training run

    def __post_init__(self) -> None:
        super().__post_init__()
        targets.settle_structure(self)
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("per_group",))  # zones of maps of other sizes hold other shares
        require_choice("feature_map", self.feature_map, ("written", "read"))
        require_choice("members", self.members, ("mean", "max"))
        require_range("alpha", self.alpha, 0.0, 1.0)
        for name in ("calibration_batches", "rounds"):
            require_range(name, getattr(self, name), 1, math.inf, closed_right=False)


Config = EZCropConfig

_SMALL = 100  # pixels of a map


def half_width(height: int, width: int, alpha: float) -> int:
    """Of the zone, in frequency bins; 0 where a side is at most 3."""
    sides = [(size, size // 2) for size in (height, width)]
    return 0 if any(centre <= 1 for _, centre in sides) else min(math.ceil(alpha * (n - 1 - c)) for n, c in sides)


def energy_outside(maps: Tensor, alpha: float) -> Tensor:
    """Share of log-amplitudes outside the zone around frequency 0, in [0, 1]; 0 for a map of zeros.

    maps: `(rows, C, height, width)`.  Returns `(rows, C)`. The spectrum of a real map is symmetric, so half of it does.
    """
    height, width = maps.shape[-2:]
    flat = maps.to(torch.promote_types(maps.dtype, torch.float32)).flatten(0, 1)
    amplitude = _squared_amplitudes(flat).sqrt_().log1p_()
    zone = half_width(height, width, alpha)
    near, total = (counts.to(amplitude) @ amplitude for counts in _counts(height, width, zone))
    outside = torch.where(total > 0, 1.0 - near / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return outside.unflatten(0, maps.shape[:2])


def _squared_amplitudes(maps: Tensor) -> Tensor:
    """Of half of the spectrum of `(maps, height, width)`: `(frequencies, maps)`. Small maps are faster multiplied."""
    height, width = maps.shape[-2:]
    if height * width <= _SMALL:
        cosines, sines = (waves.to(maps) @ maps.flatten(1).T for waves in _waves(height, width))
        return cosines.square_().addcmul_(sines, sines)
    squares = torch.view_as_real(torch.fft.rfft2(maps).flatten(1)).square_()
    return (squares[..., 0] + squares[..., 1]).T  # many times as fast as abs() and a sum over two


@lru_cache(maxsize=64)
def _waves(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of half of the frequencies, `(frequencies, pixels)` each."""
    points = torch.eye(height * width, dtype=torch.float64).unflatten(-1, (height, width))
    waves = torch.fft.rfft2(points).flatten(1).T
    return waves.real.contiguous(), waves.imag.contiguous()


@lru_cache(maxsize=64)
def _counts(height: int, width: int, zone: int) -> tuple[Tensor, Tensor]:
    """How often each frequency of the half counts in the zone, and in all, `(frequencies,)` each."""
    twice = torch.full((width // 2 + 1,), 2.0)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    row, column = torch.arange(height)[:, None], torch.arange(width // 2 + 1)
    near = ((row <= zone) | (row >= height - zone)) & (column <= zone)
    return (near * twice).flatten(), twice.repeat(height)


def _summed(alpha: float, maps: Tensor) -> tuple[Tensor, int]:
    return energy_outside(maps, alpha).sum(0, dtype=widest(maps.device)), len(maps)


def _points(model: nn.Module, target: ChannelTarget, config: EZCropConfig) -> list[Point]:
    """Where the maps of a width can be seen."""
    reduce = partial(_summed, config.alpha)
    readers = {member.tensor.rpartition(".")[0] for member in target.units.group.members if member.reads}
    taken_in = sorted(path for path in readers if isinstance(model.get_submodule(path), nn.Conv2d))
    if config.feature_map == "read" and taken_in:
        return [Point(path, reduce, taken_in=True) for path in taken_in]
    return [Point(writer.layer, reduce) for writer in target.writers]


def build(model: nn.Module, graph: Any, config: EZCropConfig) -> Recipe:
    """Masks that follow the spectra at each rise of the schedule."""
    found = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    found = [each for each in found if all(isinstance(model.get_submodule(w.layer), nn.Conv2d) for w in each.writers)]
    if not found:
        raise PruneError(f"EZCrop looks at the maps of 2-D convolutions, which {type(model).__name__} has none of.")
    units = [each.units for each in found]
    gates = [MaskGate(each, next(model.parameters()).device) for each in units]
    selection = targets.choose_units(graph, units, config)

    def measure(calibration: Calibration) -> Mapping[str, Tensor]:
        points = {(each.units.name, i): p for each in found for i, p in enumerate(_points(model, each, config))}
        seen = gather(model, calibration.batches(config.calibration_batches), points)
        scores = {}
        for each in units:
            own = torch.stack([score for (name, _), score in seen.items() if name == each.name])
            scores[each.name] = each.spread(own.mean(0) if config.members == "mean" else own.amax(0))
        return {**scores, **_sizes_of_flat([each for each in units if not scores[each.name].any()])}

    def _sizes_of_flat(flat: list[Any]) -> Mapping[str, Tensor]:
        if flat:
            names = ", ".join(each.name for each in flat)
            warnings.warn(f"the maps of {names} have no spectrum beyond frequency 0: scored by L1.", stacklevel=2)
        return unit_norms(model, flat, order=1)()

    return Recipe(
        structures=units,
        measured_scores=measure,
        selection=lasting(gates, selection),
        schedule=schedules.staircase(config.begin, config.end, config.rounds),
        gates=gates,
    )


TINY = {
    "repetitive": EZCropConfig(target_flops=0.7, begin=0.2, end=0.8, rounds=3, residual=True, members="max"),
    "read": EZCropConfig(target_units=0.6, begin=0.2, feature_map="read"),
}
