"""Growing regularization, GReg-1 and GReg-2: a rising L2 penalty shrinks units (Wang et al. 2021, arXiv 2012.09243).

Idea      a penalty lambda on the units that shall go rises step by step, so that the others take over their work
          before they are cut. GReg-1 chooses them by their size in the beginning. GReg-2 lets a small penalty rise on
          all units first and takes those that are smallest then: a unit in a flat direction of the loss gives way
          sooner, so that its size tells of curvature too.
Equations grad W += Lambda W, section 3.1 -> `GrowingPenalty.transform`; Lambda += delta every K_u steps up to a
          ceiling -> `_push`; w(lambda) = (H + lambda I)^-1 H w*, section 3.2, by which it chooses -> `_pick`.
Differs   Built from the authors' code; section numbers are those of arXiv. One goal for the model says how much goes,
          by default the same share of every width, instead of a share for each layer; residual streams are among the
          widths unless `include` leaves them out. All tensors that write a unit are penalised, the scale and offset of
          its batch norm too: behind a norm a filter may shrink without its output shrinking. `penalty_step=None` and
          `pick_step=None` take the lengths of the authors' run as shares: picking lasts a twentieth of the way from
          `begin` to `end`, pushing a half, and the final penalty is held for the rest. The cut is at `end` (the authors
          count K_s steps). Penalties, chosen units and ratios are in the checkpoint; the authors choose anew after a
          resume.
Related   `magnitude` removes the same units as GReg-1 at once, or along a schedule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_range
from hf_prune.parts import schedules, targets
from hf_prune.parts.gates import MaskGate
from hf_prune.parts.recipe import Recipe
from hf_prune.types import Paper, Phase, Plan, PruneError, Structure

PAPER = Paper(
    title="Neural Pruning via Growing Regularization",
    authors="Huan Wang, Can Qin, Yulun Zhang, Yun Fu",
    year=2021,
    arxiv="2012.09243",
    status="reconstruction",
    bibtex="""@inproceedings{wang2021neural,
  title     = {Neural Pruning via Growing Regularization},
  author    = {Wang, Huan and Qin, Can and Zhang, Yulun and Fu, Yun},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}""",
)
NEEDS_TRAINING = True
GOALS = targets.GOALS
TINY_MODEL = "image"

PICK_SHARE, PUSH_SHARE = 1 / 20, 1 / 2  # of begin..end: the authors' 5,000 and 50,000 of some 95,000 iterations
SMOOTHING = 0.9  # of the ratio of kept to pushed magnitude, in the authors' code


@dataclass(frozen=True)
class GrowingRegularizationConfig(PruneConfig):
    """Penalties, ceilings and interval are the authors' ImageNet settings; their rates are SGD's at 1e-3.

    Under SGD with momentum m a unit loses lr * Lambda / (1 - m) of itself in a step; under Adam every entry moves by
    about one learning rate, so that a norm's scale of 1 needs some 1 / lr steps to vanish. Train without gradient
    clipping where the penalty shall be compared with a gradient of full size.
    """

    method = "growing_regularization"
    rounds_widths = True

    structure: str = ""  # "element" (single weights) or "group" (whole units); empty: what the goal needs
    scope: str = "per_group"
    end: float = 0.6  # share of the optimizer steps after which pushed units are cut
    variant: int = 1  # 1: units chosen by size at `begin`; 2: by what is left of them under a penalty on all
    interval_steps: int = 5  # K_u, optimizer steps between two updates of the penalties
    penalty_step: float | None = None  # delta of pushed units at an update (paper: 1e-4); None: as long as in the paper
    penalty_max: float = 1.0  # tau, ceiling of that penalty
    pick_step: float | None = None  # delta of all units while picking (paper: 1e-5); None: as long as in the paper
    pick_max: float = 1e-2  # tau', the penalty at which units are picked; of the order of the loss's curvature
    recover: float = -1e-4  # penalty of kept units after the pick, at most 0; the negative of a coupled weight decay
    ratio_max: float = 1000.0  # whole units: kept over pushed mean |w| at which a structure's penalty stops rising
    normalised_groups: bool = False  # also prune groups under LayerNorm-like statistics, which is not exact

    def __post_init__(self) -> None:
        super().__post_init__()
        targets.settle_structure(self)
        if self.variant not in (1, 2):
            raise ValueError(f"variant must be 1 (GReg-1) or 2 (GReg-2), got {self.variant!r}.")
        require_range("interval_steps", self.interval_steps, 1, math.inf, closed_right=False)
        for name in ("penalty_step", "penalty_max", "pick_step", "pick_max", "ratio_max"):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("recover", self.recover, -1.0, 0.0, closed_left=False)


Config = GrowingRegularizationConfig


@dataclass
class _Pushed:
    """Where the penalty on one structure's units stands."""

    penalty: float = 0.0
    ratio: float = 1.0
    """Smoothed mean |w| of kept units over that of pushed ones."""
    done: bool = False


class GrowingPenalty:
    """Which units go, and how hard each is pulled to zero: selection, transforms and controller in one."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Structure],
        choose: Callable[[Mapping[str, Tensor]], Plan],
        config: GrowingRegularizationConfig,
    ) -> None:
        """choose: scores -> which units stay in the end."""
        self.units, self.choose, self.config = units, choose, config
        self.sizes = targets.sizes(model, units, order=1)
        self.device = next(model.parameters()).device
        self.others = dict(_foreign_entries(units, self.device))
        picks, whole_units = config.variant == 2, config.structure == "group"
        self.pick_max, self.recover = (config.pick_max, config.recover) if picks else (0.0, 0.0)
        self.ratio_max = config.ratio_max if whole_units else math.inf
        self._restart()

    def _restart(self) -> None:
        self.steps, self.updated_at, self.cut = 0, self.config.begin, False
        self.keep: Plan = {}
        """Empty until units were chosen."""
        self.pushed = {each.name: _Pushed() for each in self.units}

    @property
    def weight(self) -> float:
        """The highest penalty now, for logs."""
        return max(each.penalty for each in self.pushed.values())

    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """Every unit until the cut, then those that were chosen to stay."""
        if share < 1.0:
            return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        self._warn_if_early()
        if not self.keep:
            self.keep = self.choose(scores)
        return self.keep

    @torch.no_grad()
    def observe(self, metrics: Mapping[str, float]) -> None:
        """Every `interval_steps` steps between `begin` and `end`, let the penalties rise."""
        if "progress" not in metrics:
            return
        progress = metrics["progress"]
        if progress == 0.0:  # also of a run that starts again
            self._restart()
        self.cut = progress >= self.config.end
        if self.cut or progress < self.config.begin:
            return
        if self.steps % self.config.interval_steps == 0:
            self._update(progress)
        self.steps += 1

    def _update(self, progress: float) -> None:
        share = (progress - self.updated_at) / (self.config.end - self.config.begin)
        self.updated_at = progress
        if not self.keep:
            self._pick(share)
        if self.keep:
            self._push(share)

    def _pick(self, share: float) -> None:
        """Raise all penalties alike; at `pick_max`, which is 0 in GReg-1, choose by the sizes that are left."""
        reached = self.weight
        if _reaches(reached, self.pick_max):
            self.keep = self.choose(self.sizes())
            return
        step = _growth(self.config.pick_step, self.pick_max * share / PICK_SHARE)
        for each in self.pushed.values():
            each.penalty = reached + step

    def _push(self, share: float) -> None:
        """Raise the penalties of the chosen units, of each structure until its ratio or the ceiling is reached."""
        sizes, config = self.sizes(), self.config
        step = _growth(config.penalty_step, config.penalty_max * share / PUSH_SHARE)
        for name, each in self.pushed.items():
            if each.done:
                continue
            each.penalty = min(each.penalty + step, config.penalty_max)
            each.ratio = SMOOTHING * each.ratio + (1.0 - SMOOTHING) * _ratio(sizes[name], self.keep[name])
            each.done = _reaches(each.penalty, config.penalty_max) or each.ratio >= self.ratio_max

    def transform(self, parameter: nn.Parameter, written: Sequence[tuple[Structure, str]], grad: Tensor) -> Tensor:
        """`grad + Lambda * parameter`; written: structures that `parameter` writes, with its name in each."""
        if self.cut:
            return grad
        penalties = [self._penalties(structure, tensor, grad) for structure, tensor in written]
        return torch.addcmul(grad, reduce(torch.add, penalties), parameter.detach())

    def _penalties(self, structure: Structure, tensor: str, like: Tensor) -> Tensor:
        """Lambda of every entry of `tensor`; 0 where it belongs to no unit of `structure`."""
        penalties, keep = like.new_tensor(self.pushed[structure.name].penalty), self.keep.get(structure.name)
        if keep is not None:
            penalties = torch.where(structure.expand(keep, tensor), like.new_tensor(self.recover), penalties)
        others = self.others.get((structure.name, tensor))
        return penalties if others is None else penalties.masked_fill(others, 0.0)

    def _warn_if_early(self) -> None:
        short = [name for name, each in self.pushed.items() if not each.done]
        if short and not self.cut:
            least = min(self.pushed[name].penalty for name in short)
            warnings.warn(
                f"the penalties of {len(short)} of {len(self.pushed)} structures have not reached their ceiling "
                f"(lowest {least:.2g}, penalty_max {self.config.penalty_max:g}): cutting their units changes the "
                "output more than it need. Raise penalty_step and pick_step or leave them None, lower "
                "interval_steps, or train longer.",
                stacklevel=2,
            )

    def phase(self, step: int) -> Phase:
        """Everything trains; the name says what the penalties do."""
        return Phase("tune" if self.cut else "push" if self.keep else "pick")

    def state_dict(self) -> dict[str, Any]:
        """Penalties, ratios and what was chosen."""
        return {
            "steps": self.steps,
            "updated_at": self.updated_at,
            "cut": self.cut,
            "keep": dict(self.keep),
            "pushed": {name: asdict(each) for name, each in self.pushed.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.steps, self.updated_at, self.cut = state["steps"], state["updated_at"], state["cut"]
        self.keep = {name: keep.to(self.device) for name, keep in state["keep"].items()}
        self.pushed = {name: _Pushed(**each) for name, each in state["pushed"].items()}


def _growth(step: float | None, in_time: float) -> float:
    return in_time if step is None else step


def _reaches(penalty: float, ceiling: float) -> bool:
    return penalty >= ceiling * (1.0 - 1e-9)  # shares of progress add up to a little less than 1


def _ratio(sizes: Tensor, keep: Tensor) -> float:
    """Mean size of kept over that of pushed units; infinite where nothing is pushed, or nothing is left of it."""
    pushed = sizes[~keep]
    return float(sizes[keep].mean() / pushed.mean()) if bool(pushed.any()) else math.inf


def _foreign_entries(units: Sequence[Structure], device: torch.device) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Entries of tensors, by structure and tensor, that belong to no unit of the structure; where there are any."""
    for each in units:
        none = torch.zeros(each.units, dtype=torch.bool, device=device)
        for tensor in each.producers:
            others = each.expand(none, tensor)
            if bool(others.any()):
                yield (each.name, tensor), others


def build(model: nn.Module, graph: Any, config: GrowingRegularizationConfig) -> Recipe:
    """Masks that stay open until `end`, while the penalties of what they will close rise."""
    units, selection = targets.find_targets(model, graph, config, normalised_groups=config.normalised_groups)
    parameters = dict(model.named_parameters())
    written: dict[str, list[tuple[Structure, str]]] = {}
    for each in units:
        for tensor in each.producers:
            written.setdefault(tensor, []).append((each, tensor))
    _require_single_precision({tensor: parameters[tensor] for tensor in written})
    penalty = GrowingPenalty(model, units, lambda scores: selection(scores, 1.0), config)
    return Recipe(
        structures=units,
        scores=penalty.sizes,
        selection=penalty.select,
        schedule=schedules.one_shot(config.end),
        fixed_from=config.end,
        shrink_at=(config.end,) if config.structure == "group" and config.end < 1.0 else (),
        gates=[MaskGate(each, penalty.device) for each in units],
        transforms={
            parameters[tensor]: partial(penalty.transform, parameters[tensor], each) for tensor, each in written.items()
        },
        controller=penalty,
    )


def _require_single_precision(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.element_size() < 4:
            raise PruneError(
                f"weight {name!r} is {parameter.dtype}: a penalty of 1e-4 at usual learning rates is below its "
                "resolution, so nothing would shrink. Keep the model in float32, and set bf16=True for mixed precision."
            )


TINY = {
    "group": GrowingRegularizationConfig(target_units=0.5, begin=0.1, interval_steps=1),
    "group_2": GrowingRegularizationConfig(target_flops=0.6, scope="global", interval_steps=1, variant=2),
    "element": GrowingRegularizationConfig(final_sparsity=0.6, interval_steps=2),
    "element_2": GrowingRegularizationConfig(final_sparsity=0.6, scope="global", interval_steps=1, variant=2),
}
