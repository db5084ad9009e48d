"""Finite-sample bounds and asymptotic intervals hold as often as they say."""

import math

import pytest
import torch

from ctrl_rl.evaluation.bounds import (
    Estimate,
    difference,
    log_mean_exp_minus_mean,
    mean_estimate,
    mean_lower_bound,
    mean_upper_bound,
    student_t_quantile,
)

REPEATS = 200
# A true 5 % violation rate stays below this count in 99.9 % of all batches of 200.
MOST_VIOLATIONS = 21


def bernoulli(generator, count):
    return (torch.rand(count, generator=generator) < 0.1).double()


def beta_two_five(generator, count):
    # The second smallest of six uniforms is Beta(2, 5).
    return torch.rand(count, 6, generator=generator, dtype=torch.float64).sort(dim=1).values[:, 1]


def capped_lognormal(generator, count):
    """Importance weights e^(r - bound): many tiny, few near one."""
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    return (2 * normal - 4).clamp(max=0).exp()


def capped_lognormal_mean():
    normal = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-normal.square() / 2)
    return float(((2 * normal - 4).clamp(max=0).exp() * density).sum() / density.sum())


@pytest.mark.parametrize(
    ("draw", "mean"),
    [(bernoulli, 0.1), (beta_two_five, 2 / 7), (capped_lognormal, capped_lognormal_mean())],
)
def test_bounds_are_violated_at_most_as_often_as_stated(draw, mean):
    generator = torch.Generator().manual_seed(0)
    too_low = too_high = 0
    for _ in range(REPEATS):
        values = draw(generator, 500)
        too_low += mean_upper_bound(values) < mean
        too_high += mean_lower_bound(values) > mean

    assert too_low <= MOST_VIOLATIONS
    assert too_high <= MOST_VIOLATIONS


@pytest.mark.parametrize("count", [1, 2, 5])
def test_bound_holds_for_tiny_samples(count):
    generator = torch.Generator().manual_seed(0)
    violations = sum(
        mean_upper_bound(1 - bernoulli(generator, count), confidence=0.8) < 0.9
        for _ in range(REPEATS)
    )

    assert violations <= 0.2 * REPEATS


def test_bound_shrinks_towards_the_mean_as_the_sample_grows():
    generator = torch.Generator().manual_seed(1)
    values = beta_two_five(generator, 20_000)
    excess = [
        mean_upper_bound(values[:count]) - float(values[:count].mean())
        for count in (20, 200, 2_000, 20_000)
    ]

    assert all(later < earlier / 2 for earlier, later in zip(excess, excess[1:], strict=False))


def test_bound_beats_hoeffding_for_low_variance_and_approaches_the_normal_interval():
    generator = torch.Generator().manual_seed(2)
    values = 0.5 + 0.02 * torch.rand(2_000, generator=generator, dtype=torch.float64)
    excess = mean_upper_bound(values) - float(values.mean())
    hoeffding = math.sqrt(math.log(20) / (2 * len(values)))

    assert excess < hoeffding / 10

    spread = beta_two_five(generator, 2_000)
    excess = mean_upper_bound(spread) - float(spread.mean())
    assert excess < 2 * 1.645 * float(spread.std()) / math.sqrt(len(spread))


def test_higher_confidence_gives_a_higher_bound():
    values = bernoulli(torch.Generator().manual_seed(3), 300)
    bounds = [mean_upper_bound(values, confidence=level) for level in (0.5, 0.9, 0.99, 0.9999)]

    assert bounds == sorted(set(bounds))
    assert bounds[0] >= float(values.mean())


def test_degenerate_samples():
    zeros, ones = torch.zeros(200), torch.ones(200)

    # No bound can be below 1 - 0.05^(1 / N), the exact one for Bernoulli values.
    assert 1 - 0.05 ** (1 / 200) < mean_upper_bound(zeros) < 0.03
    assert mean_upper_bound(ones) == 1.0
    assert mean_lower_bound(zeros) == 0.0
    assert mean_lower_bound(ones) == pytest.approx(1 - mean_upper_bound(zeros))
    for value in (0.0, 0.3, 1.0):
        assert value <= mean_upper_bound(torch.tensor([value])) <= 1.0


def test_range_is_an_affine_change_of_units():
    values = beta_two_five(torch.Generator().manual_seed(4), 100)
    bound = mean_upper_bound(7 * values - 3, lower=-3, upper=4)

    assert bound == pytest.approx(7 * mean_upper_bound(values) - 3)
    mirrored = mean_lower_bound(3 - 7 * values, lower=-4, upper=3)
    assert mirrored == pytest.approx(-bound)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "values must be one-dimensional"),
        ([[0.5]], {}, "values must be one-dimensional"),
        ([0.5, math.nan], {}, "values must be finite, got 1"),
        ([0.5, 1.5], {}, r"values must lie in \[0.0, 1.0\]"),
        ([0.5], {"confidence": 1.0}, "confidence must lie strictly between 0 and 1"),
        ([0.5], {"lower": 1.0}, "lower must be below upper"),
    ],
)
def test_unusable_input_is_named(values, options, message):
    with pytest.raises(ValueError, match=message):
        mean_upper_bound(torch.tensor(values), **options)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (1000, 1.96234)],
)
def test_student_t_quantiles_match_the_tables(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-2)
    assert student_t_quantile(0.025, degrees) == pytest.approx(-quantile, rel=1e-2)


def test_student_t_quantile_rejects_impossible_arguments():
    with pytest.raises(ValueError, match="degrees be at least 1, got 0.975 and 0"):
        student_t_quantile(0.975, 0)


def test_mean_estimate_covers_small_normal_samples():
    generator = torch.Generator().manual_seed(5)
    estimates = [
        mean_estimate(torch.randn(5, generator=generator, dtype=torch.float64))
        for _ in range(REPEATS)
    ]

    assert sum(not e.low <= 0 <= e.high for e in estimates) <= MOST_VIOLATIONS


def test_difference_of_log_mean_exp_and_mean_uses_the_shared_draws():
    """l = d + small noise: the two errors cancel, which separate intervals cannot see."""
    generator = torch.Generator().manual_seed(6)
    violations = 0
    for _ in range(REPEATS):
        normal, noise = torch.randn(2, 400, generator=generator, dtype=torch.float64)
        shared = 0.1 * normal
        joint = log_mean_exp_minus_mean(shared + 0.02 * noise, shared)
        violations += not joint.low <= (0.1**2 + 0.02**2) / 2 <= joint.high
        assert joint.half_width < mean_estimate(shared).half_width / 2

    assert violations <= MOST_VIOLATIONS


def test_log_mean_exp_minus_mean_rejects_pairs_of_unequal_length():
    with pytest.raises(ValueError, match="must have one length, got 3 and 4"):
        log_mean_exp_minus_mean(torch.zeros(3), torch.zeros(4))


def test_difference_keeps_asymmetric_arms():
    result = difference(Estimate(2.0, 1.0, 5.0, 1.0), Estimate(1.0, -3.0, 1.0, 1.0))

    assert result.value == 1.0
    assert result.low == 0.0  # the first's lower arm of 1 and the second's upper arm of 0
    assert result.high == 6.0  # arms of 3 and 4
    assert result.half_width == 3.0
