"""Monte Carlo estimators of the soft return and of log Z for one condition.

Everything is in nats. Notation: for one rollout, `log_ratio` = sum_k (log pi - log p_ref) of the
actions taken, `kl` = sum_k KL_k in closed form, r = `reward`, and the log weight is
w = r - log_ratio. Then

    log Z = log E_ref[e^r] = log E_pi[e^w],   J = E_pi[r - kl],   gap = log Z - J >= 0.

Inputs are one-dimensional tensors of any float dtype on any device; the arithmetic is float64.
Non-finite input raises a `ValueError` that names the argument.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctrl_rl.evaluation.bounds import (
    Estimate,
    finite_vector,
    log_mean_exp_minus_mean,
    mean_estimate,
)
from ctrl_rl.rewards.reward import check_reward_bound

__all__ = [
    "Estimate",
    "checked_rollouts",
    "controlled_returns",
    "effective_sample_size",
    "eubo",
    "log_mean_exp",
    "rejection_mask",
    "soft_return",
]


def log_mean_exp(log_weights: Tensor, *, confidence: float = 0.95) -> Estimate:
    """Estimate log E[e^l] from i.i.d. log weights l.

    The value is the plain log-mean-exp, which Jensen biases low by var / (2 N mean^2) of the
    weights. It is not corrected; the interval accounts for the bias and for the skewness of the
    weights to second order, see `log_mean_exp_minus_mean`. Weights whose tail was not sampled at
    all make any such interval too low: check `effective_sample_size` too.

    Args:
        log_weights: shape [N], N >= 2, nats.
        confidence: two-sided level of the interval.

    Raises:
        ValueError: If there are fewer than two log weights or one is not finite.
    """
    log_weights = finite_vector(log_weights, "log_weights", minimum=2)
    zeros = torch.zeros_like(log_weights)
    return log_mean_exp_minus_mean(log_weights, zeros, confidence=confidence)


def effective_sample_size(log_weights: Tensor) -> float:
    """Return Kish's (1965) effective share (sum e^l)^2 / (N sum e^(2 l)), in (0, 1].

    Args:
        log_weights: shape [N], nats.

    Raises:
        ValueError: If there is no log weight or one is not finite.
    """
    log_weights = finite_vector(log_weights, "log_weights")
    log_share = 2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0)
    return min(1.0, math.exp(float(log_share)) / len(log_weights))


def soft_return(
    *, reward: Tensor, kl: Tensor, log_ratio: Tensor, confidence: float = 0.95
) -> Estimate:
    """Estimate J = E_pi[r - kl], with the closed-form KL and a control variate.

    M = log_ratio - kl has mean zero under the policy, so mean(r - kl - beta M) estimates J for any
    beta; the least-squares one is used. At the optimum r - log_ratio equals v_0(x_0), the soft
    value of the start, on every path: there beta -> 1 removes all variance but that of v_0(x_0).
    Fitting beta on the same rollouts biases J by O(1 / N), below the interval's O(1 / sqrt(N)).

    Args:
        reward: terminal rewards of the policy's rollouts, shape [N], N >= 3, nats.
        kl: summed closed-form KL of each rollout, shape [N], nats.
        log_ratio: summed log-ratio of the actions taken, shape [N], nats.
        confidence: two-sided level of the Student-t interval (N - 2 degrees of freedom).

    Raises:
        ValueError: If the shapes differ, N < 3, or an input is not finite.
    """
    controlled = controlled_returns(*checked_rollouts(reward, kl, log_ratio))
    return mean_estimate(controlled, confidence=confidence, fitted=2)


def rejection_mask(reward: Tensor, *, upper_bound: float, generator: torch.Generator) -> Tensor:
    """Accept prior samples with probability e^(r - upper_bound): exact draws of the optimum.

    Args:
        reward: rewards of samples from the prior, shape [N], nats.
        upper_bound: a bound that no reward can exceed, nats.
        generator: source of randomness, on any device.

    Returns:
        Boolean mask, shape [N], on the device of `reward`.

    Raises:
        ValueError: If a reward is not finite.
        ConfigError: If one exceeds `upper_bound` by more than 1e-5.
    """
    values = finite_vector(reward, "reward", minimum=0)
    check_reward_bound(values, "reward", upper_bound)
    # float32 noise would round acceptance probabilities below 6e-8 to 0 or 6e-8.
    uniform = torch.rand(
        len(values), generator=generator, device=generator.device, dtype=torch.float64
    )
    return (uniform.cpu() < torch.exp(values - upper_bound)).to(reward.device)


def eubo(log_weights_of_accepted: Tensor, *, confidence: float = 0.95) -> Estimate:
    """Estimate the evidence upper bound E_pi*[r - log_ratio] = log Z + KL(pi* || pi).

    Args:
        log_weights_of_accepted: r - log_ratio of paths drawn exactly from the soft-optimal law
            (prior rollouts kept by `rejection_mask`), shape [N], N >= 2, nats.
        confidence: two-sided level of the Student-t interval.

    Raises:
        ValueError: If there are fewer than two log weights or one is not finite.
    """
    values = finite_vector(log_weights_of_accepted, "log_weights_of_accepted", minimum=2)
    return mean_estimate(values, confidence=confidence)


def checked_rollouts(
    reward: Tensor, kl: Tensor, log_ratio: Tensor, *, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Return reward, kl and log_ratio of the same N >= 3 rollouts as finite float64 vectors.

    Args:
        reward: shape [N], nats.
        kl: shape [N], nats.
        log_ratio: shape [N], nats.
        prefix: put before the argument names in error messages.

    Raises:
        ValueError: If the shapes differ, N < 3, or an input is not finite.
    """
    # Two parameters are fitted, the mean and beta: three rollouts leave one degree of freedom.
    reward = finite_vector(reward, f"{prefix}reward", minimum=3)
    kl = finite_vector(kl, f"{prefix}kl", minimum=3)
    log_ratio = finite_vector(log_ratio, f"{prefix}log_ratio", minimum=3)
    if not len(reward) == len(kl) == len(log_ratio):
        raise ValueError(
            f"{prefix}reward, {prefix}kl and {prefix}log_ratio must have one length, "
            f"got {len(reward)}, {len(kl)} and {len(log_ratio)}"
        )
    return reward, kl, log_ratio


def controlled_returns(reward: Tensor, kl: Tensor, log_ratio: Tensor) -> Tensor:
    """Return r - kl - beta (log_ratio - kl) [N] with the least-squares beta, see `soft_return`."""
    returns, control = reward - kl, log_ratio - kl
    deviation = control - control.mean()
    squares = deviation.square().sum()
    # A policy equal to the prior has no control variate: every beta is the same.
    beta = (deviation * returns).sum() / squares if squares > 0 else torch.zeros(())
    return returns - beta * control
