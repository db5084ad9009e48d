"""Optimality gap log Z - J of a policy, in nats; notation as in `ctrl_rl.evaluation.estimators`."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    check_reward_bound,
    checked_rollouts,
    controlled_returns,
    effective_sample_size,
    eubo,
    log_mean_exp,
)

__all__ = ["GapReport", "average_gap_reports", "gap_report"]

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
        simultaneous: number L of conditions over which the certified bounds are to hold jointly
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
        check_reward_bound(prior, "prior_reward", reward_upper_bound)
        level = 1 - (1 - confidence) / simultaneous
        scaled = (prior - reward_upper_bound).exp().clamp(max=1.0)
        mean_bound = mean_upper_bound(scaled, confidence=(1 + level) / 2)
        # The lower end of a two-sided interval at `level` fails with half of the probability.
        lowest_return = mean_estimate(returns, confidence=level, fitted=2).low
        certified = reward_upper_bound + math.log(mean_bound) - lowest_return

    evidence_bound, evidence_gap = None, None
    if accepted_log_weights is not None:
        accepted = finite_vector(accepted_log_weights, "accepted_log_weights", minimum=0)
        if len(accepted) >= _FEWEST_ACCEPTED:
            evidence_bound = eubo(accepted, confidence=confidence)
            evidence_gap = difference(evidence_bound, value)

    contradictions = _contradictions(log_z_prior, log_z_policy, gap, certified, evidence_gap)
    control = mean_estimate(log_ratio - kl, confidence=_CONTROL_CONFIDENCE)
    if control.low > _ROUNDING or control.high < -_ROUNDING:
        contradictions.append(
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
        contradictions=tuple(contradictions),
        simultaneous=simultaneous,
    )


def _prefers(first: Estimate, second: Estimate) -> bool:
    """Whether `first` is the better of two estimates of log Z.

    The narrower one, unless their intervals exclude each other: then the higher one. Samples that
    miss a part of the target agree among themselves, so the lower one is narrow and wrong, and
    would flatter the gap.
    """
    if first.low > second.high or second.low > first.high:
        return first.value > second.value
    return first.half_width < second.half_width


def average_gap_reports(
    reports: Sequence[GapReport], names: Sequence[str] | None = None
) -> GapReport:
    """Average reports over conditions whose policy rollouts are independent of each other.

    Arms of what comes from policy rollouts combine in quadrature. Prior samples (and the accepted
    ones among them) may be shared between conditions, so arms of what comes from them are averaged
    as if perfectly correlated, which is conservative. Certified bounds are averaged.

    Args:
        reports: one per condition, all made with the same confidence.
        names: of the conditions, for contradictions; None numbers them.

    Returns:
        The average. `gap_certified`, `eubo` and `eubo_gap` are None unless every report has them.
        Contradictions of the conditions carry their names; the averages, whose intervals are
        narrower, are checked as well.

    Raises:
        ValueError: If there is no report, or all carry certified bounds but some with a
            `simultaneous` below their number.
    """
    if not reports:
        raise ValueError("reports must hold at least one GapReport, got none")
    count = len(reports)
    simultaneous = min(report.simultaneous for report in reports)
    bounds = [r.gap_certified for r in reports if r.gap_certified is not None]
    certified = sum(bounds) / count if len(bounds) == count else None
    if certified is not None and simultaneous < count:
        raise ValueError(
            f"certified bounds of {count} conditions hold jointly only with simultaneous >= "
            f"{count} in gap_report, got {simultaneous}"
        )

    value = _average([report.soft_return for report in reports], independent=True)
    log_z_prior = _average([report.log_z_prior for report in reports], independent=False)
    log_z_policy = _average([report.log_z_policy for report in reports], independent=True)
    gap = _average_gap(reports)
    evidence_bounds = [report.eubo for report in reports if report.eubo is not None]
    evidence_bound, evidence_gap = None, None
    if len(evidence_bounds) == count:
        evidence_bound = _average(evidence_bounds, independent=False)
        evidence_gap = difference(evidence_bound, value)

    labels = names or [f"condition {index}" for index in range(count)]
    contradictions = [
        f"{name}: {sentence}"
        for name, report in zip(labels, reports, strict=True)
        for sentence in report.contradictions
    ]
    if count > 1:
        found = _contradictions(log_z_prior, log_z_policy, gap, certified, evidence_gap)
        contradictions += [f"average: {sentence}" for sentence in found]
    return GapReport(
        soft_return=value,
        log_z=_average([report.log_z for report in reports], independent=False),
        log_z_prior=log_z_prior,
        log_z_policy=log_z_policy,
        log_z_from_prior=all(report.log_z_from_prior for report in reports),
        gap=gap,
        gap_certified=certified,
        eubo=evidence_bound,
        eubo_gap=evidence_gap,
        effective_sample_size=sum(r.effective_sample_size for r in reports) / count,
        contradictions=tuple(contradictions),
        simultaneous=simultaneous,
    )


def _average(estimates: Sequence[Estimate], *, independent: bool) -> Estimate:
    """Return the mean; arms in quadrature if `independent`, else as if perfectly correlated."""
    return _scaled(_total(estimates, independent=independent), 1 / len(estimates))


def _average_gap(reports: Sequence[GapReport]) -> Estimate:
    """Average gaps: prior-based log Z errors add up, all other errors are independent."""
    parts = [report.gap for report in reports if not report.log_z_from_prior]
    from_prior = [report for report in reports if report.log_z_from_prior]
    if from_prior:
        log_z = _total([report.log_z for report in from_prior], independent=False)
        value = _total([report.soft_return for report in from_prior], independent=True)
        parts.append(difference(log_z, value))
    return _scaled(_total(parts, independent=True), 1 / len(reports))


def _total(estimates: Sequence[Estimate], *, independent: bool) -> Estimate:
    def combined(arms: list[float]) -> float:
        return math.hypot(*arms) if independent else math.fsum(arms)

    value = math.fsum(estimate.value for estimate in estimates)
    down = combined([estimate.value - estimate.low for estimate in estimates])
    up = combined([estimate.high - estimate.value for estimate in estimates])
    error = combined([estimate.standard_error for estimate in estimates])
    return Estimate(value, value - down, value + up, error)


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(
        estimate.value * factor,
        estimate.low * factor,
        estimate.high * factor,
        estimate.standard_error * factor,
    )


def _contradictions(
    log_z_prior: Estimate,
    log_z_policy: Estimate,
    gap: Estimate,
    gap_certified: float | None,
    eubo_gap: Estimate | None,
) -> list[str]:
    """Return one sentence for each pair of figures that cannot both be right."""
    found = []
    if log_z_policy.high < log_z_prior.low - _ROUNDING:
        found.append(
            f"log Z from the policy's weights {log_z_policy} lies below log Z from prior samples "
            f"{log_z_prior}: the policy misses a part of the target, or one of them is wrong"
        )
    if log_z_prior.high < log_z_policy.low - _ROUNDING:
        found.append(
            f"log Z from prior samples {log_z_prior} lies below log Z from the policy's weights "
            f"{log_z_policy}: the prior samples miss a part of the target, or one of them is wrong"
        )
    if gap.high < -_ROUNDING:
        found.append(f"the gap {gap} lies below zero, which no policy can reach")
    if gap_certified is not None and gap_certified < gap.low - _ROUNDING:
        found.append(f"the certified gap {gap_certified:.4f} lies below the estimate {gap}")
    if eubo_gap is not None and eubo_gap.high < gap.low - _ROUNDING:
        found.append(f"the EUBO gap {eubo_gap} lies below the gap {gap}, which it must exceed")
    return found
