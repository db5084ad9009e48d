"""Averages of gap reports over conditions, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ctrl_rl.evaluation.bounds import Estimate, difference
from ctrl_rl.evaluation.gap import GapReport
from ctrl_rl.evaluation.gap import contradictions as contradictions_of

__all__ = ["average_gap_reports"]


def average_gap_reports(
    reports: Sequence[GapReport], names: Sequence[str] | None = None
) -> GapReport:
    """Average reports over conditions whose policy rollouts are independent of each other.

    Interval arms of figures from policy rollouts combine in quadrature. Conditions may share prior
    samples (and the accepted ones among them), so arms of figures from those are averaged as if
    perfectly correlated, which is conservative. Certified bounds are averaged.

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
        sentences = contradictions_of(log_z_prior, log_z_policy, gap, certified, evidence_gap)
        contradictions += [f"average: {sentence}" for sentence in sentences]
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
