"""Averages over seeds that a few outliers cannot move, with their uncertainty.

The interquartile mean is the mean of the middle half of all scores. Its interval comes from a
bootstrap stratified by task: every resample draws, with replacement, among the seeds of each task
and never mixes tasks.

Reference: Agarwal, Schwarzer, Castro, Courville, Bellemare, "Deep Reinforcement Learning at the
Edge of the Statistical Precipice", NeurIPS 2021, arXiv 2108.13264.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap, trim_mean

_RESAMPLES = 5000


def interquartile_mean(scores: Sequence[float]) -> float:
    """Mean without the lowest and the highest quarter of scores, each rounded down.

    Args:
        scores: of one or more seeds; fewer than four are all averaged.
    """
    return float(trim_mean(np.asarray(scores, dtype=float), 0.25))


def interquartile_interval(
    strata: Sequence[Sequence[float]], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the interquartile mean of all scores together.

    Args:
        strata: the scores of each task.
        confidence: of the interval.
        seed: of the resamples; same scores, same interval.

    Returns:
        (low, high), or None if a task has a single score: its spread is unknown.
    """
    if not strata or any(len(scores) < 2 for scores in strata):
        return None

    def pooled(*samples: Any, axis: int) -> Any:
        return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    result = bootstrap(
        tuple(np.asarray(scores, dtype=float) for scores in strata),
        pooled,
        n_resamples=_RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        paired=False,  # every stratum is resampled separately
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)
