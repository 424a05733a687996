"""ResRep: channels forgotten by a channel mix behind each layer (Ding et al. 2021, arXiv 2007.03260).

Idea      a compactor Q, an identity (C, C) mix of the channels, follows each convolution and its batch norm. Q forgets:
          some of its rows lose their task gradient and are pulled to zero unopposed. The rest of the model remembers:
          nothing pulls at it. A row of zeros is a channel that can go without loss, and Q folds into the layer.
Equations G(Q) = m * dL/dQ + lambda * row / ||row||, m = 0 in forgotten rows -> `Compactor.reset_gradient`; which rows,
          lowest norm first over all compactors and `begin_granularity` more at each refresh until the network that is
          left is cheap enough -> `Forgetting.select`; W' = Q diag(gamma / sigma) W, b' = Q beta -> `fold_channels`.
Differs   Built from the authors' code and published log; the paper's equation numbers could not be had. A batch norm
          is emitted again, with the mean of the new filters and the variance they would have on uncorrelated inputs,
          where the authors leave a bias: the model's class needs it, and training can go on. The lowest rows that reach
          the goal are cut at `end`, exactly, with a warning where some are above `merge_threshold`; the authors cut
          whatever is below it. Channels at their floor take nothing from the quota; the transform runs once per
          optimizer step, not per backward; a row of zeros is finite; every mask is rebuilt at each refresh.
          `pull="forgotten"` is ours: where a norm follows, nothing opposes the shrinking of all rows together, which
          leaves small rows to the gradient's noise, so rows that remember are pulled only up to the first choice. Every
          width that one layer inside the repeated blocks produces is a target, which in ResNets are the authors'
          targets; `residual` shares one compactor over the layers that add into a stream. `begin` is the authors' 5 of
          180 epochs. Rates of biases and decay of norms are left to the user's optimizer.
Related   `magnitude` ranks by the filters themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_goal, require_range, require_removal
from hf_prune.parts import schedules
from hf_prune.parts.budgets import PRICES
from hf_prune.parts.channel_gates import ChannelFunction, ChannelGate, at_least_float32, channel_targets
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.selection import Selection, drop_lowest, dropped, floor_count
from hf_prune.parts.targets import choose_units
from hf_prune.types import Paper, Phase, Plan

PAPER = Paper(
    title="ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting",
    authors="Xiaohan Ding, Tianxiang Hao, Jianchao Tan, Ji Liu, Jungong Han, Yuchen Guo, Guiguang Ding",
    year=2021,
    arxiv="2007.03260",
    status="reconstruction",
    bibtex="""@inproceedings{ding2021resrep,
  title     = {ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting},
  author    = {Ding, Xiaohan and Hao, Tianxiang and Tan, Jianchao and Liu, Ji and Han, Jungong and Guo, Yuchen and
               Ding, Guiguang},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}""",
)
NEEDS_TRAINING = True
GOALS = ("target_flops", "target_params", "target_bytes", "target_latency")
TINY_MODEL = "image"


@dataclass(frozen=True)
class ResRepConfig(PruneConfig):
    """Defaults are those of the authors' ResNet-50 run: 180 epochs of ImageNet, from a trained model.

    A row vanishes within `(1 - compactor_momentum) / (compactor_lr * lasso_weight)` steps and comes to rest some
    `1 / (1 - compactor_momentum)` later. Short runs need quicker choices and less momentum, and `pull="forgotten"`, as
    a stronger pull presses the rows that remember as well; with it, a later `begin` (0.15, say) ranks rows by more than
    noise. Compactors learn at `compactor_lr / (1 - compactor_momentum)`, noise of the batches included, which short
    runs do not make good for: 0.1 is much already. Train without gradient clipping (`max_grad_norm=0`), as the authors
    do: the pull is added after it, and a clipped task loses against it.
    """

    method = "resrep"
    rounds_widths = True

    structure: str = "group"
    begin: float = 5 / 180
    lasso_weight: float = 1e-4  # lambda, the pull at every row of every compactor
    compactor_lr: float = 1e-2  # of the compactors' own SGD, at the peak of the schedule
    compactor_momentum: float = 0.99  # of that SGD, which has no weight decay
    mask_interval_steps: int = 200  # optimizer steps between two choices of the rows to forget
    begin_granularity: int = 4  # rows more at each choice while the goal is not reached
    pull: str = "all"  # rows that lambda pulls from `begin` on: "all" (paper), or only the "forgotten" ones
    merge_threshold: float = 1e-5  # a row below this norm is zero: cutting it changes nothing
    residual: bool = False  # also prune residual streams, one compactor shared by all layers that add into one

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("global",))
        require_range("lasso_weight", self.lasso_weight, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("compactor_lr", self.compactor_lr, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("compactor_momentum", self.compactor_momentum, 0.0, 1.0, closed_right=False)
        require_range("mask_interval_steps", self.mask_interval_steps, 1, math.inf, closed_right=False)
        require_range("begin_granularity", self.begin_granularity, 1, math.inf, closed_right=False)
        require_range("merge_threshold", self.merge_threshold, 0.0, math.inf, closed_right=False)
        require_choice("pull", self.pull, ("all", "forgotten"))
        require_goal(self, GOALS)
        require_removal(self)


Config = ResRepConfig


class Compactor(ChannelFunction):
    """Q, `(C, C)`: mixes the channels behind a layer; the identity when new.

    Rows that `keep` marks False are being forgotten. They count in the output like all others until `closed`, from
    where on they are zero.
    """

    closed: Tensor
    sparing: Tensor

    def __init__(self, channels: int, like: Tensor, lasso_weight: float) -> None:
        super().__init__(channels, like)
        self.weight = nn.Parameter(torch.eye(channels, dtype=at_least_float32(like), device=like.device))
        for state in ("closed", "sparing"):
            self.register_buffer(state, torch.zeros((), dtype=torch.bool, device=like.device))
        self.lasso_weight = lasso_weight

    def factor(self) -> Tensor:
        """Q as the output has it."""
        return torch.where(self.alive()[:, None], self.weight, 0.0)

    def alive(self) -> Tensor:
        """All rows until the cut, though some are being forgotten, then those that are left."""
        return self.keep | ~self.closed

    def norms(self) -> Tensor:
        """Length of each row, `(C,)`."""
        return self.weight.detach().norm(dim=1)

    def reset_gradient(self, grad: Tensor) -> Tensor:
        """The task's gradient in rows that remember, and lambda towards zero in every row; nothing once closed.

        Rows that remember are not pulled while `sparing`.
        """
        task = torch.where(self.keep[:, None], grad, 0.0)
        pull = F.normalize(self.weight.detach(), dim=1)  # divides by at least 1e-12, so that a zero row stays finite
        pulled = ~self.closed & ~(self.sparing & self.keep)
        return task + self.lasso_weight * pulled[:, None] * pull


class Forgetting:
    """Chooses the rows to forget, and closes the compactors at the end: selection, projection and controller in one."""

    def __init__(
        self,
        gates: Sequence[ChannelGate[Compactor]],
        cheapest: Selection,
        within_goal: Callable[[Plan], bool],
        config: ResRepConfig,
    ) -> None:
        """cheapest: the highest scores that fit the goal.  within_goal: whether a plan costs no more than the goal."""
        self.gates, self.cheapest, self.within_goal, self.config = gates, cheapest, within_goal, config
        self.steps = 0
        self.floors = {gate.name: floor_count(config.min_keep, len(gate.keep())) for gate in gates}

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Norm of each row."""
        return {gate.name: gate.function.norms() for gate in self.gates}

    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """The rows that remember: chosen anew every `mask_interval_steps` after `begin`, and for good at `end`."""
        if share >= 1.0:
            return self.cheapest(scores, 1.0)
        if share > 0.0 and self.steps % self.config.mask_interval_steps == 0:
            self._spare(self.config.pull == "forgotten")  # what was pulled equally so far is ranked by now
            return self._refreshed(scores)
        return self.plan

    @property
    def plan(self) -> Plan:
        """Which rows remember now."""
        return {gate.name: gate.function.keep for gate in self.gates}

    def _refreshed(self, scores: Mapping[str, Tensor]) -> Plan:
        """As many of the lowest rows as the goal needs, but few more than now while the goal is not reached."""
        now, wanted = self.plan, self.cheapest(scores, 1.0)
        quota = dropped(now) + self.config.begin_granularity
        if self.within_goal(now) or dropped(wanted) <= quota:
            return wanted
        return drop_lowest(scores, quota, self.floors)

    def _spare(self, sparing: bool) -> None:
        for gate in self.gates:
            gate.function.sparing.fill_(sparing)

    def count(self) -> None:
        """One more optimizer step was made."""
        self.steps += 1

    def phase(self, step: int) -> Phase:
        """Forgetting, then training what is left."""
        return Phase("tune" if self.closed else "forget")

    def observe(self, metrics: Mapping[str, float]) -> None:
        """At `end`, after the last choice of rows, cut them."""
        if "progress" not in metrics:
            return
        if metrics["progress"] == 0.0:  # also of a run that starts again
            self.steps = 0
            self._spare(False)
        ended = metrics["progress"] >= self.config.end
        if ended and not self.closed:
            self._warn_of_loss()
        for gate in self.gates:
            gate.function.closed.fill_(ended)

    @property
    def closed(self) -> bool:
        """Whether forgotten rows are zero by now."""
        return bool(self.gates[0].function.closed)

    def _warn_of_loss(self) -> None:
        norms = torch.cat([gate.function.norms()[~gate.function.keep].cpu() for gate in self.gates])
        late = norms[norms > self.config.merge_threshold]
        if len(late):
            warnings.warn(
                f"{len(late)} of the {len(norms)} channels that go are not forgotten yet (largest row norm "
                f"{late.max():.2g}, merge_threshold {self.config.merge_threshold:g}): cutting them changes the output. "
                "Train longer, set end below 1 to train on after the cut, or raise lasso_weight, compactor_lr or "
                "begin_granularity, or lower mask_interval_steps; gradient clipping (max_grad_norm) should be off.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps made; the rest is in the compactors."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.steps = state["steps"]


def build(model: nn.Module, graph: Any, config: ResRepConfig) -> Recipe:
    """A compactor for every width that can lose channels exactly; rows forgotten up to `end`."""
    goal = config.goal
    assert goal is not None
    targets = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    like = next(model.parameters())
    compactors = [Compactor(target.units.units, like, config.lasso_weight) for target in targets]
    gates = [ChannelGate(target, [each], "compactors") for target, each in zip(targets, compactors, strict=True)]
    units = [target.units for target in targets]
    traced, price = graph.traced, PRICES[goal.name]
    allowed = goal.value * price(traced, None)
    cheapest = choose_units(graph, units, config)
    forgetting = Forgetting(gates, cheapest, lambda plan: price(traced, plan) <= allowed, config)
    return Recipe(
        structures=units,
        scores=forgetting.scores,
        selection=forgetting.select,
        schedule=schedules.linear(config.begin, config.end),
        fixed_from=config.end,
        gates=gates,
        transforms={compactor.weight: compactor.reset_gradient for compactor in compactors},
        projections=[forgetting.count],
        controller=forgetting,
        # Adam would divide the pull by its own size, and rows would not shrink as a whole.
        optimizers={"compactors": partial(torch.optim.SGD, lr=config.compactor_lr, momentum=config.compactor_momentum)},
    )


TINY = {
    "params": ResRepConfig(target_params=0.7, begin=0.1, mask_interval_steps=2, begin_granularity=1),
    "flops_then_tune": ResRepConfig(target_flops=0.9, begin=0.0, end=0.6, mask_interval_steps=1, lasso_weight=0.1),
    "residual": ResRepConfig(target_params=0.6, begin=0.1, mask_interval_steps=3, residual=True),
}
