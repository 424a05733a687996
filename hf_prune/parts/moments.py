"""First and second moments of channels behind a norm and an activation: in closed form, and what they say of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of channels: `(C,)` and `(C, C)`, double precision."""

    mean: Tensor
    second: Tensor


def gaussian(beta: Tensor, gamma: Tensor, rho: Tensor) -> Moments:
    """Of Z ~ N(beta, gamma^2) with correlations `rho`, `(C, C)`; gamma has its sign."""
    covariance = rho * torch.outer(gamma, gamma)
    covariance.diagonal().copy_(gamma.square())
    return Moments(beta, torch.outer(beta, beta) + covariance)


def rectified(beta: Tensor, gamma: Tensor, rho: Tensor, nodes: int = 64) -> Moments:
    """Of relu(Z). E relu(Z_i) relu(Z_j) integrates relu(Z_i) times the mean of relu(Z_j) given Z_i over Z_i > 0."""
    size = gamma.abs().clamp(min=1e-12)
    t = beta / size
    mean = beta * _cdf(t) + size * _density(t)
    second = (beta.square() + size.square()) * _cdf(t) + beta * size * _density(t)
    r = (rho * torch.outer(gamma.sign(), gamma.sign())).clamp(-1.0, 1.0)
    spread = (size * (1 - r.square()).clamp(min=0.0).sqrt()).clamp(min=1e-12)  # of Z_j given Z_i, row i
    cross = torch.zeros_like(r)
    places, weights = _gauss_legendre(nodes, beta)
    low = (-t).clamp(-9.0, 9.0)
    for place, weight in zip(places, weights, strict=True):
        u = low + (9.0 - low) * (1 + place) / 2
        given = beta + r * size * u[:, None]
        conditional = given * _cdf(given / spread) + spread * _density(given / spread)
        cross += ((9.0 - low) / 2 * weight * F.relu(beta + size * u) * _density(u))[:, None] * conditional
    cross = (cross + cross.T) / 2
    cross.diagonal().copy_(second)
    return Moments(mean, cross)


def distance(moments: Moments) -> Tensor:
    """E(Y_i - Y_j)^2 over E Y_i^2 + E Y_j^2, `(C, C)` in [0, 2]; two silent channels are alike."""
    power = moments.second.diagonal()
    both = power[:, None] + power
    gap = (both - 2 * moments.second).clamp(min=0.0)
    near = torch.where(both > 1e-12, gap / both.clamp(min=1e-12), 0.0)
    near.diagonal().zero_()
    return (near + near.T) / 2


def fit(moments: Moments, i: int, j: int, *, through_zero: bool) -> tuple[float, float]:
    """Best a and c in Y_j ~ a Y_i + c."""
    mean, second = moments.mean, moments.second
    if through_zero:
        return float(second[i, j] / second[i, i].clamp(min=1e-12)), 0.0
    slope = (second[i, j] - mean[i] * mean[j]) / (second[i, i] - mean[i].square()).clamp(min=1e-12)
    return float(slope), float(mean[j] - slope * mean[i])


def _gauss_legendre(nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.as_tensor(places).to(like), torch.as_tensor(weights).to(like)


def _cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
