"""Optimality gap log Z - J of a policy, in nats; notation as in `ctrl_rl.evaluation.estimators`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ctrl_rl.evaluation.bounds import (
    Estimate,
    difference,
    finite_vector,
    log_mean_exp_minus_mean,
    mean_estimate,
    mean_upper_bound,
)
from ctrl_rl.evaluation.estimators import (
    checked_rollouts,
    controlled_returns,
    effective_sample_size,
    eubo,
    log_mean_exp,
)
from ctrl_rl.rewards.reward import check_reward_bound

__all__ = ["GapReport", "contradictions", "gap_report", "law_gap_report"]

_FEWEST_ACCEPTED = 10
# Sums of float32 log-densities agree to about this many nats; less is rounding, no contradiction.
_ROUNDING = 1e-4
# The mean of log_ratio - kl is tested at this level: a failure means wrong code, not bad luck.
_CONTROL_CONFIDENCE = 1 - 1e-5


@dataclass(frozen=True)
class GapReport:
    """Optimality gap of one condition, or the average over conditions. All figures in nats.

    Attributes:
        soft_return: J.
        log_z: the better of the next two, see `gap_report` (in an average: the mean).
        log_z_prior: log mean e^r over prior samples, independent of J.
        log_z_policy: log mean e^w over the policy's rollouts.
        log_z_from_prior: whether `log_z` is `log_z_prior` (in an average: for every condition).
        gap: log_z - soft_return, with the interval of the difference.
        gap_certified: upper bound of the gap, or None if the reward has no known upper bound: then
            the gap is estimated only. Its log Z part holds at every sample size; its J part rests
            on the central limit theorem, so it is certified only as far as that holds for J.
        eubo: evidence upper bound of log Z, or None with fewer than 10 accepted paths.
        eubo_gap: eubo - soft_return = KL(pi || pi*) + KL(pi* || pi) >= gap, or None likewise.
        effective_sample_size: share of the policy's rollouts that carry weight, in (0, 1].
        contradictions: sentences about figures that exclude each other beyond their intervals.
            With 95 % intervals, chance alone puts one into up to about one report in 20 (most
            when one of the figures is nearly exact): a single one asks for more samples.
        simultaneous: number of conditions over which `gap_certified` holds jointly.
    """

    soft_return: Estimate
    log_z: Estimate
    log_z_prior: Estimate
    log_z_policy: Estimate
    log_z_from_prior: bool
    gap: Estimate
    gap_certified: float | None
    eubo: Estimate | None
    eubo_gap: Estimate | None
    effective_sample_size: float
    contradictions: tuple[str, ...]
    simultaneous: int


def gap_report(
    *,
    policy_reward: Tensor,
    policy_kl: Tensor,
    policy_log_ratio: Tensor,
    prior_reward: Tensor,
    accepted_log_weights: Tensor | None,
    reward_upper_bound: float | None,
    confidence: float = 0.95,
    simultaneous: int = 1,
) -> GapReport:
    """Estimate the optimality gap of one condition from policy rollouts and prior samples.

    log Z comes from the prior samples (A) or from the policy's importance weights (B), whichever
    interval is narrower, or from the higher one where the two exclude each other. A is independent
    of J, so the arms combine in quadrature. B shares its rollouts with J and near the optimum both
    errors are the same, mean v_0(x_0): there the interval is that of the difference, from the
    joint influence function of each rollout.

    A weakness of B: weights that miss a part of the target agree among themselves, so B can be
    narrow and too low. `contradictions` names the cases in which A or the EUBO show it. Where A
    excludes B, the higher of the two is taken, since the lower one would flatter the gap.

    `gap_certified` spends half of the error probability (1 - confidence) / simultaneous on an
    upper bound of E[e^(r - reward_upper_bound)] and half on a lower limit of J.

    Args:
        policy_reward: rewards of the policy's rollouts, shape [N], N >= 3, nats.
        policy_kl: their summed closed-form KL, shape [N], nats.
        policy_log_ratio: their summed log-ratio, shape [N], nats.
        prior_reward: rewards of independent prior samples in the order drawn, shape [M], M >= 2.
        accepted_log_weights: r - log_ratio of accepted prior rollouts, shape [A], or None.
        reward_upper_bound: a bound that no reward can exceed (0 for log-probabilities), or None.
        confidence: level of all intervals and of the certified bound.
        simultaneous: number L of conditions over which the certified bounds must hold jointly
            (Bonferroni). The intervals of the estimates are not affected.

    Raises:
        ValueError: If an input is not finite, shapes differ or are too small, or a setting is out
            of range.
        ConfigError: If a reward exceeds `reward_upper_bound` by more than 1e-5.
    """
    if simultaneous < 1:
        raise ValueError(f"simultaneous must be at least 1, got {simultaneous}")
    reward, kl, log_ratio = checked_rollouts(
        policy_reward, policy_kl, policy_log_ratio, prefix="policy_"
    )
    prior = finite_vector(prior_reward, "prior_reward", minimum=2)
    returns, log_weights = controlled_returns(reward, kl, log_ratio), reward - log_ratio

    value = mean_estimate(returns, confidence=confidence, fitted=2)
    log_z_prior = log_mean_exp(prior, confidence=confidence)
    log_z_policy = log_mean_exp(log_weights, confidence=confidence)
    from_prior = _prefers(log_z_prior, log_z_policy)
    if from_prior:
        gap = difference(log_z_prior, value)
    else:
        gap = log_mean_exp_minus_mean(log_weights, returns, confidence=confidence, fitted=2)

    certified = None
    if reward_upper_bound is not None:
        check_reward_bound(reward, "policy_reward", reward_upper_bound)
        # The lower end of a two-sided interval at `level` fails with half of the probability.
        level = 1 - (1 - confidence) / simultaneous
        lowest_return = mean_estimate(returns, confidence=level, fitted=2).low
        certified = _highest_log_z(prior, reward_upper_bound, level) - lowest_return

    evidence_bound, evidence_gap = None, None
    if accepted_log_weights is not None:
        accepted = finite_vector(accepted_log_weights, "accepted_log_weights", minimum=0)
        if len(accepted) >= _FEWEST_ACCEPTED:
            evidence_bound = eubo(accepted, confidence=confidence)
            evidence_gap = difference(evidence_bound, value)

    sentences = contradictions(log_z_prior, log_z_policy, gap, certified, evidence_gap)
    control = mean_estimate(log_ratio - kl, confidence=_CONTROL_CONFIDENCE)
    if control.low > _ROUNDING or control.high < -_ROUNDING:
        sentences.append(
            f"log-ratio minus closed-form KL has mean {control} over the policy's rollouts, but "
            "its expectation is zero: one of the two is wrong"
        )
    return GapReport(
        soft_return=value,
        log_z=log_z_prior if from_prior else log_z_policy,
        log_z_prior=log_z_prior,
        log_z_policy=log_z_policy,
        log_z_from_prior=from_prior,
        gap=gap,
        gap_certified=certified,
        eubo=evidence_bound,
        eubo_gap=evidence_gap,
        effective_sample_size=effective_sample_size(log_weights),
        contradictions=tuple(sentences),
        simultaneous=simultaneous,
    )


def law_gap_report(
    *,
    soft_return: Callable[[float], Estimate],
    prior_reward: Tensor,
    reward_upper_bound: float | None,
    confidence: float = 0.95,
    simultaneous: int = 1,
) -> GapReport:
    """The gap of one condition of a law that states its soft return.

    log Z comes from prior samples that the law did not draw, so the arms combine in quadrature.
    Such a law has no densities on given paths, hence no EUBO.

    Args:
        soft_return: J by confidence, nats.
        prior_reward: rewards of independent prior samples in the order drawn, shape [M], M >= 2.
        reward_upper_bound: a bound that no reward can exceed, or None.
        confidence: level of all intervals and of the certified bound.
        simultaneous: number of conditions over which the certified bounds must hold jointly.

    Raises:
        ValueError: If an input is not finite, too small or out of range.
        ConfigError: If a reward exceeds `reward_upper_bound` by more than 1e-5.
    """
    prior = finite_vector(prior_reward, "prior_reward", minimum=2)
    value, log_z = soft_return(confidence), log_mean_exp(prior, confidence=confidence)
    gap, certified = difference(log_z, value), None
    if reward_upper_bound is not None:
        level = 1 - (1 - confidence) / simultaneous
        lowest_return = soft_return(level).low
        certified = _highest_log_z(prior, reward_upper_bound, level) - lowest_return
    return GapReport(
        soft_return=value,
        log_z=log_z,
        log_z_prior=log_z,
        log_z_policy=value,
        log_z_from_prior=True,
        gap=gap,
        gap_certified=certified,
        eubo=None,
        eubo_gap=None,
        effective_sample_size=1.0,
        contradictions=tuple(contradictions(log_z, value, gap, certified, None)),
        simultaneous=simultaneous,
    )


def _highest_log_z(prior_reward: Tensor, reward_upper_bound: float, level: float) -> float:
    """An upper bound of log Z that spends half of the error probability of `level`."""
    check_reward_bound(prior_reward, "prior_reward", reward_upper_bound)
    scaled = (prior_reward - reward_upper_bound).exp().clamp(max=1.0)
    return reward_upper_bound + math.log(mean_upper_bound(scaled, confidence=(1 + level) / 2))


def _prefers(first: Estimate, second: Estimate) -> bool:
    """Whether `first` is the better of two estimates of log Z.

    The narrower one, unless their intervals exclude each other: then the higher one. Samples that
    miss a part of the target agree among themselves, so the lower one is narrow and wrong, and
    would flatter the gap.
    """
    if first.low > second.high or second.low > first.high:
        return first.value > second.value
    return first.half_width < second.half_width


def contradictions(
    log_z_prior: Estimate,
    log_z_policy: Estimate,
    gap: Estimate,
    gap_certified: float | None,
    eubo_gap: Estimate | None,
) -> list[str]:
    """Return one sentence for each pair of figures that cannot both be right."""
    sentences = []
    if log_z_policy.high < log_z_prior.low - _ROUNDING:
        sentences.append(
            f"log Z from the policy's weights {log_z_policy} lies below log Z from prior samples "
            f"{log_z_prior}: the policy misses a part of the target, or one of them is wrong"
        )
    if log_z_prior.high < log_z_policy.low - _ROUNDING:
        sentences.append(
            f"log Z from prior samples {log_z_prior} lies below log Z from the policy's weights "
            f"{log_z_policy}: the prior samples miss a part of the target, or one of them is wrong"
        )
    if gap.high < -_ROUNDING:
        sentences.append(f"the gap {gap} lies below zero, which no policy can reach")
    if gap_certified is not None and gap_certified < gap.low - _ROUNDING:
        sentences.append(f"the certified gap {gap_certified:.4f} lies below the estimate {gap}")
    if eubo_gap is not None and eubo_gap.high < gap.low - _ROUNDING:
        sentences.append(f"the EUBO gap {eubo_gap} lies below the gap {gap}, which it must exceed")
    return sentences
