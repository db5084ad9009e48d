"""Confidence statements about means: finite-sample betting bounds and asymptotic intervals.

`mean_upper_bound` and `mean_lower_bound` hold at every sample size for bounded values.
The functions that return an `Estimate` rest on the central limit theorem; where the logarithm of
a mean is involved they add the second-order (skewness and Jensen) terms of its Edgeworth
expansion. All arithmetic is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = [
    "Estimate",
    "difference",
    "finite_vector",
    "log_mean_exp_minus_mean",
    "mean_estimate",
    "mean_lower_bound",
    "mean_upper_bound",
    "student_t_quantile",
]

# Largest share of the capital that one value may cost. Waudby-Smith & Ramdas recommend 1/2 or 3/4;
# the larger one is tighter for the small means that e^(reward - bound) usually has.
_LARGEST_STAKE = 0.75
_BISECTION_STEPS = 60


@dataclass(frozen=True)
class Estimate:
    """A point estimate with a two-sided confidence interval.

    Attributes:
        value: Point estimate (nats, for every estimator of this package).
        low: Lower end of the interval, at most `value`.
        high: Upper end of the interval, at least `value`.
        standard_error: First-order (delta-method) standard deviation of `value`.
    """

    value: float
    low: float
    high: float
    standard_error: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval, which need not be symmetric around `value`."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        """Return `value [low, high]` with four decimals."""
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def finite_vector(values: Tensor, name: str, *, minimum: int = 1) -> Tensor:
    """Return `values` [N] detached, as float64 on the CPU.

    Args:
        values: Tensor of any real dtype.
        name: Argument name for the error message.
        minimum: Smallest accepted N.

    Raises:
        ValueError: If `values` is not one-dimensional, too short, or not finite.
    """
    if values.ndim != 1 or len(values) < minimum:
        raise ValueError(
            f"{name} must be one-dimensional with at least {minimum} entries, "
            f"got shape {tuple(values.shape)}"
        )
    # The CPU first: some accelerators (MPS) have no float64.
    values = values.detach().cpu().double()
    if not bool(torch.isfinite(values).all()):
        count = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name} must be finite, got {count} NaN or infinite of {len(values)}")
    return values


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")


def mean_upper_bound(
    values: Tensor, *, confidence: float = 0.95, lower: float = 0.0, upper: float = 1.0
) -> float:
    """Return a finite-sample upper confidence bound for the mean of bounded i.i.d. values.

    One-sided betting bound with predictable plug-in bets (Waudby-Smith & Ramdas 2024, "Estimating
    means of bounded random variables by betting", JRSS-B 86(1), section 4: one side of the hedged
    capital of theorem 3, with the bets for a fixed N). For a candidate mean m, on values scaled to
    [0, 1], a gambler who bets that the mean is below m holds

        capital_t(m) = prod_{i <= t} (1 - lambda_i(m) (x_i - m)),
        lambda_i(m) = min(sqrt(2 log(1 / alpha) / (N variance_{i-1})), c / (1 - m)),

    a non-negative supermartingale when the mean is at least m. By Ville's inequality its running
    maximum reaches 1 / alpha with probability at most alpha, so every m at which it does is
    rejected. Each factor is non-decreasing in m (also where the bet is truncated), hence the
    rejected means form an upper interval, whose lower end is found by bisection.

    The bets adapt to the values seen so far, so the bound depends on their order. They are used
    in the order given, which must not have been chosen by looking at them (do not sort).

    Args:
        values: Shape [N], N >= 1, i.i.d., in [lower, upper].
        confidence: Probability that the bound holds, for every N and every distribution.
        lower: Smallest possible value.
        upper: Largest possible value.

    Returns:
        The bound, never below the empirical mean and never above `upper`.

    Raises:
        ValueError: If values are missing, not finite or outside [lower, upper], or if
            `confidence` is not in (0, 1) or `lower >= upper`.
    """
    _check_confidence(confidence)
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise ValueError(f"lower must be below upper and both finite, got [{lower}, {upper}]")
    values = finite_vector(values, "values")
    smallest, largest = float(values.min()), float(values.max())
    if smallest < lower or largest > upper:
        raise ValueError(
            f"values must lie in [{lower}, {upper}], got a range of [{smallest}, {largest}]"
        )
    scaled = (values - lower) / (upper - lower)
    log_threshold = -math.log1p(-confidence)
    bets = _predictable_bets(scaled, log_threshold)

    def rejected(candidate: float) -> bool:
        largest_bet = _LARGEST_STAKE / (1 - candidate) if candidate < 1 else math.inf
        factors = torch.log1p(-bets.clamp(max=largest_bet) * (scaled - candidate))
        return bool(factors.cumsum(0).max() >= log_threshold)

    accepted_mean, rejected_mean = float(scaled.mean()), 1.0
    if not rejected(rejected_mean):
        return upper
    for _ in range(_BISECTION_STEPS):
        middle = (accepted_mean + rejected_mean) / 2
        if rejected(middle):
            rejected_mean = middle
        else:
            accepted_mean = middle
    bound = lower + (upper - lower) * rejected_mean
    return min(upper, max(bound, float(values.mean())))


def mean_lower_bound(
    values: Tensor, *, confidence: float = 0.95, lower: float = 0.0, upper: float = 1.0
) -> float:
    """Return a finite-sample lower confidence bound: `mean_upper_bound` of the mirrored values.

    Arguments, errors and the role of the order are as in `mean_upper_bound`.
    """
    # Mirrored at zero: unlike `lower + upper - values`, a negation does not round out of range.
    return -mean_upper_bound(-values, confidence=confidence, lower=-upper, upper=-lower)


def _predictable_bets(scaled: Tensor, log_threshold: float) -> Tensor:
    """Return untruncated bets [N]; bet t uses the values before t only."""
    count = len(scaled)
    sizes = torch.arange(2, count + 2, dtype=torch.float64)
    # One pseudo-value with mean 1/2 and variance 1/4 keeps the first bets finite.
    means = (0.5 + scaled.cumsum(0)) / sizes
    variances = (0.25 + (scaled - means).square().cumsum(0)) / sizes
    previous = torch.cat([torch.full((1,), 0.25, dtype=torch.float64), variances[:-1]])
    return (2 * log_threshold / (count * previous)).sqrt()


def student_t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution.

    Exact for one and two degrees of freedom, otherwise the expansion of Abramowitz & Stegun
    (1964), equation 26.7.5, whose relative error at 97.5 % is below 1 % from three degrees on.

    Args:
        probability: Strictly between 0 and 1.
        degrees: Degrees of freedom, at least 1.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0.0 < probability < 1.0 or degrees < 1:
        raise ValueError(
            "probability must lie strictly between 0 and 1 and degrees be at least 1, "
            f"got {probability} and {degrees}"
        )
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def mean_estimate(values: Tensor, *, confidence: float = 0.95, fitted: int = 1) -> Estimate:
    """Return the mean of `values` [N] with its Student-t interval.

    Args:
        values: Finite, shape [N] with N > `fitted`.
        confidence: Two-sided level of the interval.
        fitted: Parameters estimated from the same values (1: the mean), not counted as degrees of
            freedom.

    Raises:
        ValueError: If `values` is too short or not finite, or `confidence` is not in (0, 1).
    """
    _check_confidence(confidence)
    values = finite_vector(values, "values", minimum=fitted + 1)
    degrees = len(values) - fitted
    mean = float(values.mean())
    squares = float((values - mean).square().sum())
    standard_error = math.sqrt(squares / degrees / len(values))
    arm = student_t_quantile((1 + confidence) / 2, degrees) * standard_error
    return Estimate(mean, mean - arm, mean + arm, standard_error)


def log_mean_exp_minus_mean(
    log_weights: Tensor, subtracted: Tensor, *, confidence: float = 0.95, fitted: int = 1
) -> Estimate:
    """Estimate log E[e^l] - E[d] from N i.i.d. pairs (l, d).

    The point estimate is the plug-in one, log mean(e^l) - mean(d). By Jensen it is biased low by
    about var(e^l) / (2 N E[e^l]^2); it is not shifted, the interval is. With u = e^l / E[e^l] - 1
    and the influence f = u - (d - E[d]) of standard deviation s and skewness g, the studentised
    estimate has, to order 1 / sqrt(N), the p-quantile z + (A + B z^2) / sqrt(N) with

        A = -g / 6 + (E[u f]^2 / s^3 - E[u^2] / s) / 2,    B = -g / 3 + E[u f]^2 / (2 s^3)

    (expansion of a studentised smooth function of means, Hall 1992, "The Bootstrap and Edgeworth
    Expansion", section 2.6; the quadratic term of log mean(e^l) carries the bias). The moments are
    plug-in ones. A sample skewness of heavy-tailed weights is too small rather than too large, so
    the correction may widen either arm of the Student-t interval but never shortens one.

    Args:
        log_weights: l, shape [N], finite.
        subtracted: d, shape [N], finite.
        confidence: Two-sided level of the interval.
        fitted: Parameters estimated from the same draws, see `mean_estimate`.

    Raises:
        ValueError: If the shapes differ, N <= `fitted`, or an input is not finite.
    """
    _check_confidence(confidence)
    log_weights = finite_vector(log_weights, "log_weights", minimum=fitted + 1)
    subtracted = finite_vector(subtracted, "subtracted")
    if len(log_weights) != len(subtracted):
        raise ValueError(
            f"log_weights and subtracted must have one length, got {len(log_weights)} "
            f"and {len(subtracted)}"
        )
    count, degrees = len(log_weights), len(log_weights) - fitted
    log_mean = torch.logsumexp(log_weights, 0) - math.log(count)
    centred = torch.expm1(log_weights - log_mean)
    influence = centred - (subtracted - subtracted.mean())
    value = float(log_mean - subtracted.mean())
    variance = float(influence.square().mean())
    standard_error = math.sqrt(variance / degrees)
    quantile = student_t_quantile((1 + confidence) / 2, degrees)
    arm = quantile * standard_error
    correction = 0.0
    if variance > 0:
        # s (A + B z^2) / N, written to divide nothing by a tiny s alone.
        skew = float(influence.pow(3).mean()) / variance
        linked = float((centred * influence).mean()) ** 2 / variance
        constant = -skew / 6 + (linked - float(centred.square().mean())) / 2
        correction = (constant + quantile**2 * (linked / 2 - skew / 3)) / count
    low, high = value - max(arm, arm + correction), value + max(arm, arm - correction)
    return Estimate(value, low, high, standard_error)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Return first - second for two independent estimates.

    The arms are combined in quadrature, each with the one that moves the difference the same way
    (MOVER, Zou & Donner 2008, "Construction of confidence limits about effect measures", equation
    3), which keeps asymmetric intervals asymmetric.
    """
    value = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    error = math.hypot(first.standard_error, second.standard_error)
    return Estimate(value, value - down, value + up, error)
