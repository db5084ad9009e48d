"""The layout of summary.json: figures overall and per condition, for prior, policy, exact."""

import math
from typing import Any

from ctrl_rl.evaluation.average import average_gap_reports
from ctrl_rl.evaluation.bounds import Estimate
from ctrl_rl.evaluation.gap import GapReport
from ctrl_rl.evaluation.quality import Judge, Quality


def summarise(
    names: list[str],
    gaps: list[GapReport],
    rows: dict[str, list[Quality]],
    rewards: dict[str, list[float]],
    kl: list[float],
    judge: Judge,
) -> dict[str, Any]:
    """Figures overall and per condition, in the layout of summary.json."""
    overall = average_gap_reports(gaps, names)

    def table(indices: list[int], gap: GapReport) -> dict[str, Any]:
        def row(name: str) -> dict[str, Any]:
            chosen = [rows[name][i] for i in indices]
            return {"reward": _mean([rewards[name][i] for i in indices]), **judge.combine(chosen)}

        log_z = gap.log_z.value
        prior, policy = row("prior"), row("policy")
        exact = row("exact") if rows["exact"] else None
        if exact is not None and exact["reward"] is not None:
            exact |= {"kl_nats": exact["reward"] - log_z, "log_z": log_z, "gap_nats": 0.0}
        return {
            **_gap_figures(gap),
            "kl_nats": _mean([kl[i] for i in indices]),
            **policy,
            "prior": prior | {"kl_nats": 0.0, "log_z": log_z, "gap_nats": log_z - prior["reward"]},
            "exact": exact,
        }

    return {
        **table(list(range(len(names))), overall),
        "contradictions": list(overall.contradictions),
        "per_label": {name: table([i], gaps[i]) for i, name in enumerate(names)},
    }


def _gap_figures(gap: GapReport) -> dict[str, Any]:
    def interval(estimate: Estimate | None) -> list[float] | None:
        return None if estimate is None else [estimate.low, estimate.high]

    return {
        "soft_return": gap.soft_return.value,
        "soft_return_ci": interval(gap.soft_return),
        "log_z": gap.log_z.value,
        "log_z_ci": interval(gap.log_z),
        "log_z_prior": gap.log_z_prior.value,
        "log_z_policy": gap.log_z_policy.value,
        "gap_nats": gap.gap.value,
        "gap_nats_ci": interval(gap.gap),
        "gap_nats_certified": gap.gap_certified,
        "eubo_gap_nats": None if gap.eubo_gap is None else gap.eubo_gap.value,
        "eubo_gap_nats_ci": interval(gap.eubo_gap),
        "ess": gap.effective_sample_size,
    }


def _mean(values: list[float]) -> float | None:
    return None if any(math.isnan(v) for v in values) else sum(values) / len(values)
