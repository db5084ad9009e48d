"""Isotropic Gaussians with a shared standard deviation, in float32 and in nats.

All quantities are sums over the event dimensions, never means: a mean would tie the temperature
of the soft objective to the resolution. Ratios are formed as one sum of differences of squares;
as a difference of two log-densities they would lose about four digits at 12k dimensions.

Shapes: `value`, `loc`, `prior_loc` are ``[*B, *S]``, `scale` is ``[*B]``; results are ``[*B]``.
"""

import math

import torch
from torch import Tensor


def expand_to(scale: Tensor, value: Tensor) -> Tensor:
    """Append singleton dimensions to `scale` [*B] until it broadcasts against `value` [*B, *S]."""
    return scale.reshape(scale.shape + (1,) * (value.ndim - scale.ndim))


def _sum_event(value: Tensor, scale: Tensor) -> Tensor:
    return value.flatten(scale.ndim).sum(-1) if value.ndim > scale.ndim else value


def log_prob(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log-density of N(loc, scale^2 I) at `value`, in nats, summed over dimensions: [*B]."""
    value, loc, scale = value.float(), loc.float(), scale.float()
    dims = math.prod(value.shape[scale.ndim :])
    squared = _sum_event((value - loc).square(), scale)
    return -0.5 * squared / scale.square() - dims * (scale.log() + 0.5 * math.log(2 * math.pi))


def kl(loc: Tensor, prior_loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2 I) || N(prior_loc, scale^2 I)) = |loc - prior_loc|^2 / 2 scale^2, [*B]."""
    loc, prior_loc, scale = loc.float(), prior_loc.float(), scale.float()
    return _sum_event((loc - prior_loc).square(), scale) / (2 * scale.square())


def log_ratio(value: Tensor, loc: Tensor, prior_loc: Tensor, scale: Tensor) -> Tensor:
    """Log of N(loc, scale^2 I) over N(prior_loc, scale^2 I) at `value`, in nats: [*B].

    ``((a - m_ref)^2 - (a - m)^2) / 2 s^2`` factored as ``(m - m_ref)(2a - m - m_ref) / 2 s^2``:
    exactly 0 where the two means are the same.
    """
    value, loc, prior_loc, scale = value.float(), loc.float(), prior_loc.float(), scale.float()
    product = (loc - prior_loc) * (2 * value - loc - prior_loc)
    return _sum_event(product, scale) / (2 * scale.square())


def draw(loc: Tensor, scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw from N(loc, scale^2 I) by reparameterisation: the result carries loc's gradient."""
    noise = torch.randn(loc.shape, generator=generator, device=loc.device, dtype=torch.float32)
    return loc.float() + expand_to(scale, loc) * noise
