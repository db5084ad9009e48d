"""Estimators against the closed form of a one-step Gaussian shift.

x ~ N(0, 1) under the prior and N(m, 1) under the policy, r(x) = a x - c. Then
log Z = a^2 / 2 - c, J = a m - c - m^2 / 2, gap = (a - m)^2 / 2, EUBO - J = (a - m)^2.
"""

import math
import re

import pytest
import torch

from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.average import average_gap_reports
from ctrl_rl.evaluation.estimators import (
    effective_sample_size,
    eubo,
    log_mean_exp,
    rejection_mask,
    soft_return,
)
from ctrl_rl.evaluation.gap import gap_report

OFFSET = 0.7


def normal(count, generator):
    return torch.randn(count, generator=generator, dtype=torch.float64)


def shift_data(slope, shift, *, seed, count=2_000):
    """Return the inputs of `gap_report` for reward `slope` and policy shift `shift`."""
    generator = torch.Generator().manual_seed(seed)
    policy = shift + normal(count, generator)
    optimum = slope + normal(count // 4, generator)

    def log_ratio(x):
        return shift * x - shift**2 / 2

    return {
        "policy_reward": slope * policy - OFFSET,
        "policy_kl": torch.full_like(policy, shift**2 / 2),
        "policy_log_ratio": log_ratio(policy),
        "prior_reward": slope * normal(count, generator) - OFFSET,
        "accepted_log_weights": slope * optimum - OFFSET - log_ratio(optimum),
        "reward_upper_bound": None,
    }


def bounded_data(shift, *, seed, count=2_000):
    """Return inputs for the reward -x^2 / 2 <= 0 whose log Z is -log(2) / 2.

    The optimum is N(0, 1/2), so the gap of N(shift, 1) is KL = (log(1/2) + 1 + 2 shift^2) / 2.
    """
    generator = torch.Generator().manual_seed(seed)
    policy, prior = shift + normal(count, generator), normal(count, generator)
    reward = -prior.square() / 2
    kept = prior[rejection_mask(reward, upper_bound=0.0, generator=generator)]
    return {
        "policy_reward": -policy.square() / 2,
        "policy_kl": torch.full_like(policy, shift**2 / 2),
        "policy_log_ratio": shift * policy - shift**2 / 2,
        "prior_reward": reward,
        "accepted_log_weights": -kept.square() / 2 - (shift * kept - shift**2 / 2),
        "reward_upper_bound": 0.0,
    }


def covers(estimate, truth):
    return estimate.low - 1e-9 <= truth <= estimate.high + 1e-9


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_log_mean_exp_covers_lognormal_weights(spread):
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    estimates = [log_mean_exp(spread * normal(2_000, generator)) for generator in generators]

    assert sum(covers(estimate, spread**2 / 2) for estimate in estimates) >= 90


def test_log_mean_exp_is_exact_for_constant_and_huge_log_weights():
    estimate = log_mean_exp(torch.full((7,), 5_000.0))

    assert estimate.value == estimate.low == estimate.high == 5_000.0


def test_effective_sample_size_ranges_from_one_draw_to_all():
    assert effective_sample_size(torch.full((8,), -900.0)) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([0.0, -800.0, -800.0, -800.0])) == 0.25
    assert effective_sample_size(torch.tensor([0.0, math.log(3.0)])) == pytest.approx(16 / 20)


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.9])
def test_soft_return_covers_the_closed_form(shift):
    held = 0
    for seed in range(100):
        data = shift_data(1.0, shift, seed=seed, count=200)
        reward, kl, ratio = (data[f"policy_{key}"] for key in ("reward", "kl", "log_ratio"))
        estimate = soft_return(reward=reward, kl=kl, log_ratio=ratio)
        held += covers(estimate, shift - OFFSET - shift**2 / 2)

    assert held >= 90


def test_control_variate_removes_all_variance_at_the_optimum():
    data = shift_data(1.0, 1.0, seed=0)
    reward, kl = data["policy_reward"], data["policy_kl"]
    estimate = soft_return(reward=reward, kl=kl, log_ratio=data["policy_log_ratio"])

    assert estimate.value == pytest.approx(0.5 - OFFSET, abs=1e-12)
    assert estimate.half_width < 1e-12 < float((reward - kl).std()) / 1e6


def test_soft_return_of_the_prior_needs_no_control_variate():
    reward = normal(50, torch.Generator().manual_seed(0))
    estimate = soft_return(reward=reward, kl=torch.zeros(50), log_ratio=torch.zeros(50))

    assert estimate.value == pytest.approx(float(reward.mean()))


def test_rejection_draws_from_the_optimum():
    generator = torch.Generator().manual_seed(0)
    prior = normal(20_000, generator)
    mask = rejection_mask(-prior.square() / 2, upper_bound=0.0, generator=generator)

    assert float(mask.double().mean()) == pytest.approx(math.sqrt(0.5), abs=0.015)
    assert float(prior[mask].var()) == pytest.approx(0.5, abs=0.03)


def test_rejection_refuses_rewards_above_the_bound_but_forgives_rounding():
    generator = torch.Generator().manual_seed(0)

    assert rejection_mask(torch.tensor([5e-6]), upper_bound=0.0, generator=generator).all()
    with pytest.raises(ConfigError, match="reward reaches .* above its stated upper bound"):
        rejection_mask(torch.tensor([-1.0, 0.1]), upper_bound=0.0, generator=generator)
    with pytest.raises(ValueError, match="upper bound of reward must be finite"):
        rejection_mask(torch.tensor([-1.0]), upper_bound=math.inf, generator=generator)


def test_eubo_is_log_z_plus_the_reverse_divergence():
    data = shift_data(1.0, 0.4, seed=0, count=8_000)

    assert covers(eubo(data["accepted_log_weights"]), 0.5 - OFFSET + 0.6**2 / 2)


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.95])
def test_gap_report_covers_every_closed_form(shift):
    truths = {
        "soft_return": shift - OFFSET - shift**2 / 2,
        "log_z_prior": 0.5 - OFFSET,
        "log_z_policy": 0.5 - OFFSET,
        "log_z": 0.5 - OFFSET,
        "gap": (1 - shift) ** 2 / 2,
        "eubo_gap": (1 - shift) ** 2,
    }
    reports = [gap_report(**shift_data(1.0, shift, seed=seed)) for seed in range(100)]

    for name, truth in truths.items():
        assert sum(covers(getattr(report, name), truth) for report in reports) >= 90, name
    assert sum(bool(report.contradictions) for report in reports) <= 10
    assert all(report.gap_certified is None for report in reports)


def test_gap_interval_is_much_narrower_than_its_parts_near_the_optimum():
    report = gap_report(**shift_data(1.0, 0.97, seed=0))

    assert report.gap.half_width < report.log_z_prior.half_width / 20


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_certified_gap_bounds_the_true_gap(shift):
    truth = (math.log(0.5) + 1 + 2 * shift**2) / 2
    reports = [gap_report(**bounded_data(shift, seed=seed, count=500)) for seed in range(50)]

    # 5 % of 50 and three standard deviations.
    assert sum(report.gap_certified < truth for report in reports) <= 7
    assert all(report.gap_certified < truth + 0.5 for report in reports)
    assert sum(covers(report.gap, truth) for report in reports) >= 43


def test_certifying_several_conditions_jointly_costs_little():
    data = bounded_data(0.3, seed=0)
    alone, joint = gap_report(**data), gap_report(**data, simultaneous=10)

    assert alone.gap_certified < joint.gap_certified < alone.gap_certified + 0.1
    assert alone.gap == joint.gap


def test_few_accepted_paths_give_no_eubo():
    data = shift_data(1.0, 0.5, seed=0)
    data["accepted_log_weights"] = data["accepted_log_weights"][:9]
    report = gap_report(**data)

    assert report.eubo is None
    assert report.eubo_gap is None
    assert gap_report(**{**data, "accepted_log_weights": None}).eubo_gap is None


@pytest.mark.parametrize(
    ("name", "wrong_by", "sentence"),
    [
        ("prior_reward", 1.0, "log Z from the policy's weights .* lies below"),
        ("prior_reward", -1.0, "log Z from prior samples .* lies below"),
        ("accepted_log_weights", -1.0, "the EUBO gap .* lies below the gap"),
        ("policy_log_ratio", 1.0, "log-ratio minus closed-form KL has mean 1.0"),
        ("policy_kl", 1.0, "log-ratio minus closed-form KL has mean -0.99"),
    ],
)
def test_wrong_figures_are_called_contradictions(name, wrong_by, sentence):
    data = shift_data(1.0, 0.8, seed=0)
    assert gap_report(**data).contradictions == ()

    data[name] = data[name] + wrong_by
    found = gap_report(**data).contradictions

    assert any(re.match(sentence, text) for text in found), found


def test_where_the_estimators_exclude_each_other_the_higher_is_taken():
    """A policy that misses a mode has narrow weights, and its log Z is too low."""
    low = shift_data(1.0, 0.0, seed=0, count=500)
    low["prior_reward"] = shift_data(1.0, 0.0, seed=1, count=5_000)["prior_reward"] - 2.0
    assert not gap_report(**low).log_z_from_prior

    high = shift_data(1.0, 0.9, seed=0)
    high["prior_reward"] = high["prior_reward"] + 2.0
    report = gap_report(**high)
    assert report.log_z_policy.half_width < report.log_z_prior.half_width
    assert report.log_z_from_prior
    assert any("log Z" in text for text in report.contradictions)


def test_negative_gap_is_called_a_contradiction():
    data = shift_data(1.0, 0.0, seed=0, count=500)
    data["policy_kl"] = data["policy_kl"] - 3.0
    data["policy_log_ratio"] = data["policy_log_ratio"] - 3.0
    data["prior_reward"] = data["prior_reward"][:50]
    found = gap_report(**data).contradictions
    assert found, "a soft return above log Z must not pass in silence"


def test_certified_gap_below_the_gap_is_called_a_contradiction():
    data = bounded_data(0.2, seed=0, count=5_000)
    data["prior_reward"] = data["prior_reward"][:500] - 3.0
    report = gap_report(**data)

    assert not report.log_z_from_prior
    assert any(text.startswith("the certified gap") for text in report.contradictions)


@pytest.mark.parametrize(
    "name",
    ["policy_reward", "policy_kl", "policy_log_ratio", "prior_reward", "accepted_log_weights"],
)
def test_non_finite_input_is_named(name):
    data = shift_data(1.0, 0.5, seed=0)
    data[name][3] = math.nan

    with pytest.raises(ValueError, match=f"{name} must be finite"):
        gap_report(**data)


def test_misfitting_input_is_named():
    data = shift_data(1.0, 0.5, seed=0)

    with pytest.raises(ValueError, match="policy_reward, policy_kl and policy_log_ratio must"):
        gap_report(**{**data, "policy_kl": data["policy_kl"][:-1]})
    with pytest.raises(ConfigError, match="policy_reward reaches"):
        gap_report(**{**data, "reward_upper_bound": 0.0})
    with pytest.raises(ValueError, match="simultaneous must be at least 1"):
        gap_report(**data, simultaneous=0)
    with pytest.raises(ValueError, match="log_weights must be one-dimensional"):
        log_mean_exp(torch.zeros(1))


def test_average_combines_independent_and_shared_errors():
    reports = [gap_report(**shift_data(1.0, 0.0, seed=seed)) for seed in range(4)]
    average = average_gap_reports(reports)

    arms = [report.soft_return.half_width for report in reports]
    assert average.soft_return.half_width == pytest.approx(math.hypot(*arms) / 4)
    arms = [report.log_z_prior.half_width for report in reports]
    assert average.log_z_prior.half_width == pytest.approx(sum(arms) / 4)
    assert average.gap.value == pytest.approx(average.log_z.value - average.soft_return.value)
    assert covers(average.gap, 0.5)
    assert covers(average.eubo_gap, 1.0)
    # Never narrower than independence, never wider than perfect correlation of everything.
    arms = [report.gap.half_width for report in reports]
    assert math.hypot(*arms) / 4 <= average.gap.half_width * (1 + 1e-9) <= sum(arms) / 4 + 1e-9


def test_average_certifies_only_what_holds_jointly():
    jointly = [gap_report(**bounded_data(0.5, seed=seed), simultaneous=3) for seed in range(3)]
    alone = [gap_report(**bounded_data(0.5, seed=seed)) for seed in range(3)]

    mean = sum(report.gap_certified for report in jointly) / 3
    assert average_gap_reports(jointly).gap_certified == pytest.approx(mean)
    with pytest.raises(ValueError, match="hold jointly only with simultaneous >= 3"):
        average_gap_reports(alone)
    uncertified = gap_report(**shift_data(1.0, 0.5, seed=0))
    assert average_gap_reports([*jointly, uncertified]).gap_certified is None
    with pytest.raises(ValueError, match="at least one GapReport"):
        average_gap_reports([])


def test_average_reports_contradictions_by_condition():
    right, wrong = shift_data(1.0, 0.8, seed=0), shift_data(1.0, 0.8, seed=1)
    wrong["prior_reward"] = wrong["prior_reward"] + 1.0
    average = average_gap_reports([gap_report(**right), gap_report(**wrong)])

    assert average.contradictions[0].startswith("condition 1: log Z from the policy's weights")
    assert any(text.startswith("average: ") for text in average.contradictions)
