"""BWCP: channels kept by how likely they are active once whitened (Shao et al. 2021, arXiv 2105.06423).

Idea      a batch norm tells how likely each channel is to be above zero. Whitening the channels first makes channels
          that are alive more likely, and leaves dead ones dead. In training each channel is masked at random by its
          probability, which a penalty on scales and offsets lowers; at the end likely channels stay. Whitening is a
          mix of channels and folds into the layer: nothing is left of it at inference.
Equations Sigma_N = covariance / ||gamma||^2, S_0 = I, S_k = (3 S_{k-1} - S_{k-1}^3 Sigma_N) / 2, M = S_T
          -> `whitening`; P_c = (1 + erf((beta'_c - delta) / (sqrt 2 |gamma'_c|))) / 2 with gamma' = M gamma, beta' =
          M beta -> `activation_probability`; m_c = sigmoid((logit P_c + g1 - g0) / tau) -> `soft_mask`; penalty
          sum_c (lambda1 |gamma_c| + lambda2 beta_c) -> `Probabilities.penalty`; kept where P > 0.5, P from the running
          mean of M -> `_likely`; W' = M diag(gamma / sigma) W -> `channel_gates.fold_channels`.
Differs   Read in the ICLR 2022 submission, which does not number T and the momentum of the running mean: 5 and 0.1,
          usual for iterative normalization. Its sharpening of P, of no given form, multiplies the logit of P by a
          factor that rises from 1 at `begin` to `sharpness` at `end`. Trace and ||gamma|| are those of each block of
          channels. All layers that add into a residual stream share one mask, of the geometric mean of their
          probabilities; the paper multiplies those of a projection block and uses them along identity shortcuts. One
          draw a channel and step. The term in beta ends where P is below 0.01, from where it would only drift. The
          first step is plain, and evaluations before `end` multiply by P. The paper has no goal: with one, the
          penalty's weight is steered by dual ascent on the expected price, and the most probable channels that reach
          it stay. `ramp` leads a trained net into whitening. Norms without scale, and of widths that cannot be cut
          exactly, stay as they are.
Related   `resrep` folds a learned mix of channels; here the mix follows from the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.config import PruneConfig, require_choice, require_range, require_removal
from hf_prune.parts import schedules
from hf_prune.parts.budgets import share_of_sizes
from hf_prune.parts.channel_gates import (
    ChannelFunction,
    ChannelGate,
    ChannelTarget,
    at_least_float32,
    channel_targets,
    multiply_channels,
)
from hf_prune.parts.controllers import DualAscent
from hf_prune.parts.randomness import generator
from hf_prune.parts.recipe import Recipe
from hf_prune.parts.selection import Selection, floor_count, keep_floors
from hf_prune.parts.statistics import mean_over_processes
from hf_prune.parts.targets import choose_units
from hf_prune.types import Paper, Phase, Plan, PruneError

PAPER = Paper(
    title="BWCP: Probabilistic Learning-to-Prune Channels for ConvNets via Batch Whitening",
    authors="Wenqi Shao, Hang Yu, Zhaoyang Zhang, Hang Xu, Zhenguo Li, Ping Luo",
    year=2021,
    arxiv="2105.06423",
    bibtex="""@article{shao2021bwcp,
  title   = {BWCP: Probabilistic Learning-to-Prune Channels for ConvNets via Batch Whitening},
  author  = {Shao, Wenqi and Yu, Hang and Zhang, Zhaoyang and Xu, Hang and Li, Zhenguo and Luo, Ping},
  journal = {arXiv preprint arXiv:2105.06423},
  year    = {2021}
}""",
)
NEEDS_TRAINING = True
GOALS = ("target_flops", "target_params", "target_bytes")
TINY_MODEL = "image"


@dataclass(frozen=True)
class BWCPConfig(PruneConfig):
    """Defaults are those of the paper's ImageNet run: from scratch, 120 epochs, the penalty from the 20th on.

    Without a goal the lambdas alone decide how much goes. The penalty's pull on a scale is a few times the weight decay
    over the whole run: short runs need larger lambdas, some 0.1 with AdamW for hundreds of steps, or a goal and a
    larger `penalty_gain`. They also need a moderate learning rate, as whitening makes activations a few times larger.
    From a trained model, whose channels are above zero some three times in ten, random masks act like heavy dropout and
    cost more than the pruning: a short search (`ramp=0.3, begin=0.0, end=0.2`) leaves most steps to recover.
    """

    method = "bwcp"
    rounds_widths = True

    structure: str = "group"
    begin: float = 20 / 120
    lambda1: float = 7e-5  # pull at the absolute scale of every channel
    lambda2: float = 3.5e-5  # pull at the offset of every channel
    delta: float = 0.05  # a channel is active above it
    temperature: float = 0.5  # tau, of the random masks
    sharpness: float = 100.0  # factor on the logit of P at the end of the run
    block_size: int = 16  # channels that are whitened together
    iterations: int = 5  # T, of Newton's method
    mean_momentum: float = 0.1  # of the running mean of M
    ramp: float = 0.0  # share of the run in which whitening and masks set in; 0 from scratch
    penalty_gain: float = 10.0  # of the dual ascent towards a goal
    residual: bool = True  # also the norms of layers that add into a residual stream

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("structure", self.structure, ("group",))
        require_choice("scope", self.scope, ("global",))
        for name in ("lambda1", "lambda2", "delta", "penalty_gain"):
            require_range(name, getattr(self, name), 0.0, math.inf, closed_right=False)
        require_range("temperature", self.temperature, 0.0, math.inf, closed_left=False, closed_right=False)
        require_range("sharpness", self.sharpness, 1.0, math.inf, closed_right=False)
        require_range("block_size", self.block_size, 1, math.inf, closed_right=False)
        require_range("iterations", self.iterations, 1, math.inf, closed_right=False)
        require_range("mean_momentum", self.mean_momentum, 0.0, 1.0, closed_left=False)
        require_range("ramp", self.ramp, 0.0, 1.0)
        require_removal(self)
        if self.goal is not None and not self.lambda1 + self.lambda2 > 0:
            raise ValueError(
                "lambda1 and lambda2 are both 0, so that nothing pulls towards the goal; raise one of them."
            )


Config = BWCPConfig

_LEAST = 1e-6  # of probabilities on either side, so that logits are finite
_DEAD = 0.01  # below it the offset is pulled no further


def whitening(centred: Tensor, gamma: Tensor, iterations: int) -> Tensor:
    """M, close to the inverse root of the covariance over ||gamma||^2, `(blocks, b, b)`, by Newton's method.

    centred: channels without their means, `(blocks, b, observations)`.  gamma: scales, `(blocks, b)`.
    """
    covariance = centred @ centred.mT / centred.shape[-1]
    sigma = covariance / gamma.square().sum(1).clamp(min=torch.finfo(gamma.dtype).tiny)[:, None, None]
    root = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device).expand_as(sigma)
    for _ in range(iterations):
        root = 1.5 * root - 0.5 * root @ root @ root @ sigma
    return root


def activation_probability(gamma: Tensor, beta: Tensor, delta: float) -> Tensor:
    """P that a channel, normal with standard deviation |gamma| and mean beta, is above delta, `(C,)`."""
    return 0.5 * (1.0 + torch.erf((beta - delta) / (math.sqrt(2.0) * gamma.abs().clamp(min=1e-9))))


def soft_mask(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Binary Gumbel softmax, `(C,)` in [0, 1]: above 1/2 as often as the probability behind `logits` says.

    noise: differences of two standard Gumbel draws.
    """
    return ((logits + noise) / temperature).sigmoid()


def logistic_noise(count: int, source: torch.Generator) -> Tensor:
    """Differences of two standard Gumbel draws, which are logistic, `(count,)`."""
    return torch.rand(count, generator=source, dtype=torch.float64).clamp(_LEAST, 1.0 - _LEAST).logit()


class WhitenedNorm(ChannelFunction):
    """Whitening and mask behind one batch norm. It learns nothing: all follows from the norm and the batch."""

    mean_root: Tensor
    strength: Tensor
    sharpness: Tensor
    closed: Tensor

    def __init__(self, norm: Any, config: BWCPConfig) -> None:
        like: Tensor = norm.weight
        super().__init__(len(like), like)
        self.config, self.norm = config, (norm,)  # in a tuple: the norm is no part of what stands behind it
        self.peers: Sequence[WhitenedNorm] = (self,)
        """Those behind all layers that write the group."""
        self.noise = torch.zeros(())
        blocks, size = -(-len(like) // config.block_size), min(config.block_size, len(like))
        eye = torch.eye(size, dtype=at_least_float32(like), device=like.device)
        self.register_buffer("mean_root", eye.repeat(blocks, 1, 1))
        self.register_buffer("strength", torch.zeros((), dtype=eye.dtype, device=like.device))
        self.register_buffer("sharpness", torch.ones((), dtype=eye.dtype, device=like.device))
        self.register_buffer("closed", torch.zeros((), dtype=torch.bool, device=like.device))

    def scale_and_offset(self) -> tuple[Tensor, Tensor]:
        """Gamma and beta, `(C,)` each."""
        norm: Any = self.norm[0]
        return norm.weight.to(self.mean_root.dtype), norm.bias.to(self.mean_root.dtype)

    def mix(self, roots: Tensor) -> Tensor:
        """Blocks `(blocks, b, b)` as one matrix `(C, C)`, between the identity and M as `strength` says."""
        channels = len(self.keep)
        whole = torch.block_diag(*roots)[:channels, :channels]
        return torch.lerp(torch.eye(channels, dtype=whole.dtype, device=whole.device), whole, self.strength)

    def probability(self, mix: Tensor) -> Tensor:
        """P of each channel by itself, `(C,)`."""
        gamma, beta = self.scale_and_offset()
        return activation_probability(mix @ gamma, mix @ beta, self.config.delta)

    def shared_probability(self, mix: Tensor | None = None) -> Tensor:
        """Geometric mean of P over the layers of the group, `(C,)`.  mix: of this layer, that of the batch."""
        mixes = [mix if peer is self and mix is not None else peer.mix(peer.mean_root) for peer in self.peers]
        each = [peer.probability(own).clamp(min=_LEAST).log() for peer, own in zip(self.peers, mixes, strict=True)]
        return torch.stack(each).mean(0).exp()

    def mask(self, probability: Tensor) -> Tensor:
        """What channels are multiplied by: the plan once closed; before, a draw in training and P in evaluation."""
        if self.closed:
            return self.keep.to(probability.dtype)
        logits = self.sharpness * probability.clamp(_LEAST, 1.0 - _LEAST).logit()
        noise = self.noise.to(logits)
        mask = soft_mask(logits, noise, self.config.temperature) if self.training else logits.sigmoid()
        return torch.lerp(torch.ones_like(mask), mask, self.strength)

    def factor(self) -> Tensor:
        """Mask and mix as one matrix `(C, C)`, from the running mean of M."""
        mix = self.mix(self.mean_root)
        return self.mask(self.shared_probability())[:, None] * mix

    def alive(self) -> Tensor:
        """All channels until the end, then those that are left."""
        return self.keep | ~self.closed

    def forward(self, x: Tensor, host: nn.Module) -> Tensor:
        """`x`, whitened and masked."""
        with torch.autocast(x.device.type, enabled=False):  # the iteration diverges in half precision
            factor = self._batch_factor(x) if self.training else self.factor()
        return multiply_channels(x, factor, host)

    def _batch_factor(self, x: Tensor) -> Tensor:
        """As `factor`, with M of the batch, which the running mean follows."""
        roots = whitening(self._blocks(x), self._padded(self.scale_and_offset()[0]), self.config.iterations)
        with torch.no_grad():
            self.mean_root.lerp_(roots.to(self.mean_root), self.config.mean_momentum)
        mix = self.mix(roots)
        return self.mask(self.shared_probability(mix))[:, None] * mix

    def _blocks(self, x: Tensor) -> Tensor:
        """Channels without their offset, `(blocks, b, observations)`; zeros fill the last block."""
        flat = x.movedim(1, 0).flatten(1).to(self.mean_root.dtype) - self.scale_and_offset()[1][:, None]
        return self._padded(flat)

    def _padded(self, channels: Tensor) -> Tensor:
        blocks, size, _ = self.mean_root.shape
        fill = [0, 0] * (channels.ndim - 1) + [0, blocks * size - len(channels)]
        return F.pad(channels, fill).unflatten(0, (blocks, size))


class Probabilities:
    """Draws masks, steers the penalty and chooses the channels that stay: selection, penalty and controller."""

    def __init__(
        self, gates: Sequence[ChannelGate[WhitenedNorm]], graph: Any, chosen: Selection, config: BWCPConfig
    ) -> None:
        self.gates, self.chosen, self.config = gates, chosen, config
        self.progress = 0.0
        self.dual: DualAscent | None = None
        if config.goal is not None:
            self.price = share_of_sizes(graph, config.goal, [gate.name for gate in gates])
            path = schedules.linear(config.begin, config.end)
            self.dual = DualAscent(1.0, config.goal, path, gain=config.penalty_gain)

    @property
    def weight(self) -> float:
        """What the lambdas are multiplied by in the coming step."""
        return self.dual.weight if self.dual is not None else 1.0

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """P of each channel from the running mean of M, over all processes."""
        return {gate.name: mean_over_processes(gate.function.shared_probability()) for gate in self.gates}

    def select(self, scores: Mapping[str, Tensor], share: float) -> Plan:
        """All channels until `end`, then those that `chosen` says."""
        if share < 1.0:
            return {gate.name: torch.ones_like(gate.function.keep) for gate in self.gates}
        return self.chosen(self.scores(), share)

    def penalty(self, progress: float) -> Tensor:
        """The pull at scales and offsets; none before `begin`."""
        terms = []
        for gate in self.gates:
            alive = gate.function.shared_probability().detach() > _DEAD
            for function in gate.functions:
                gamma, beta = function.scale_and_offset()
                pull = self.config.lambda1 * gamma.abs() + self.config.lambda2 * torch.where(alive, beta, 0.0)
                terms.append(pull.sum())
        active = self.config.begin <= progress < self.config.end
        return (self.weight if active else 0.0) * torch.stack(terms).sum()

    def phase(self, step: int) -> Phase:
        """Always everything, without penalty once channels are chosen."""
        return Phase("tune" if self.progress >= self.config.end else "train")

    def observe(self, metrics: Mapping[str, float]) -> None:
        """After an optimizer step: the next draws, and the penalty's weight."""
        if "progress" not in metrics:
            return
        self.progress = metrics["progress"]
        self._draw()
        if self.dual is not None and self.progress < self.config.end:
            expected = torch.stack([score.sum() for score in self.scores().values()])
            self.dual.observe({"progress": self.progress, "sparsity": 1.0 - float(self.price(expected))})

    def _draw(self) -> None:
        config, progress = self.config, self.progress
        strength = min(progress / config.ramp, 1.0) if config.ramp else float(progress > 0.0)
        searched = min(max((progress - config.begin) / (config.end - config.begin), 0.0), 1.0)
        for gate in self.gates:
            source = generator(config.seed, gate.name, repr(progress))
            noise = logistic_noise(len(gate.function.keep), source).to(gate.function.mean_root)
            for function in gate.functions:
                function.noise = noise
                function.strength.fill_(strength)
                function.sharpness.fill_(config.sharpness**searched)
                function.closed.fill_(progress >= config.end)

    def state_dict(self) -> dict[str, Any]:
        """Progress, from which masks are drawn, and the penalty's weight."""
        return {"progress": self.progress, "dual": self.dual.state_dict() if self.dual is not None else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.progress = state["progress"]
        if self.dual is not None:
            self.dual.load_state_dict(state["dual"])
        self._draw()


def _likely(targets: Sequence[ChannelTarget], min_keep: float) -> Selection:
    """Channels that are more likely active than not, and each width's floor."""
    floors = {target.units.name: floor_count(min_keep, target.units.units) for target in targets}
    return lambda scores, share: keep_floors({name: score > 0.5 for name, score in scores.items()}, scores, floors)


def _gate(model: nn.Module, target: ChannelTarget, config: BWCPConfig) -> ChannelGate[WhitenedNorm]:
    functions = [WhitenedNorm(model.get_submodule(writer.host), config) for writer in target.writers]
    for function in functions:
        function.peers = tuple(functions)
    return ChannelGate(target, functions, "whitening")


def build(model: nn.Module, graph: Any, config: BWCPConfig) -> Recipe:
    """Whitening and a mask behind every batch norm whose width can lose channels exactly."""
    found = channel_targets(
        model, graph.traced, include=config.include, exclude=config.exclude, residual=config.residual
    )
    targets = [target for target in found if all(_has_scale(model, writer.norm) for writer in target.writers)]
    if not targets:
        raise PruneError(
            f"no width of {type(model).__name__} is written through batch norms with scale and offset, from which BWCP "
            "reads how likely a channel is active; use another method for this model."
        )
    gates, units = [_gate(model, target, config) for target in targets], [target.units for target in targets]
    chosen = _likely(targets, config.min_keep) if config.goal is None else choose_units(graph, units, config)
    probabilities = Probabilities(gates, graph.traced, chosen, config)
    return Recipe(
        structures=units,
        selection=probabilities.select,
        schedule=schedules.one_shot(config.end),
        fixed_from=config.end,
        gates=gates,
        penalties={"scales": probabilities.penalty},
        controller=probabilities,
    )


def _has_scale(model: nn.Module, norm: str | None) -> bool:
    return norm is not None and model.get_submodule(norm).weight is not None


TINY = {
    "goal": BWCPConfig(target_params=0.6, lambda1=1e-2, begin=0.1, block_size=6, end=0.8),
    "inner_from_trained": BWCPConfig(target_flops=0.8, begin=0.1, residual=False, ramp=0.3, lambda2=1e-3),
}
