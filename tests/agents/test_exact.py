"""Trained agents against exact answers, and the estimators against closed forms."""

import json

import pytest
import torch
from exact_answers import shortfalls
from exact_tasks import ShiftPolicy, gaussian_oracle, scales

from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.evaluation.estimators import log_mean_exp
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose

# Agents that optimise the soft return: each must reach the optimum of every exact task.
SOFT_AGENTS = [
    *("ctrl", "alignprop", "adjoint", "nabla_db"),
    *("reinforce", "ppo", "ppo_critic", "grpo", "dpok"),
    *("tb", "vargrad", "db", "subtb", "pcl"),
    *("h_transform", "rwr", "d3po", "sac"),
]
# What an agent needs beyond the task's own yaml, as overrides by (task, agent).
SETTINGS = {
    # Half of the task's updates are enough for all but db and subtb; for numbers not for reinforce.
    **{
        ("gaussian", agent): ["trainer.updates=200"]
        for agent in SOFT_AGENTS
        if agent not in ("db", "subtb")
    },
    **{("gaussian_mean", agent): ["trainer.updates=200"] for agent in ("ctrl", "tb", "adjoint")},
    ("mixture1d", "subtb"): ["trainer.learning_rate.critic=3e-2", "trainer.updates=800"],
    ("mixture1d", "nabla_db"): ["trainer.updates=800"],
    ("mixture2d", "adjoint"): ["trainer.updates=1000"],
    ("mixture2d", "nabla_db"): ["trainer.updates=1200"],
}
MISSES = pytest.mark.xfail(reason="over 0.30 nats, see docs/exact.md", strict=True)
# Slow agents of the mixture; the others run with every `make test`.
SLOW = {
    *("alignprop", "nabla_db", "ppo_critic", "grpo", "dpok", "vargrad", "db", "subtb"),
    *("h_transform", "rwr", "d3po", "sac", "pcl", "adjoint", "ppo", "tb", "ctrl"),
}
SLOW_ON_GAUSSIAN = {"sac", "ppo_critic", "nabla_db"}


def slow(agents, slow_ones):
    """Agents as parameters, the slow ones for `make science`."""
    marks = {True: [pytest.mark.science], False: []}
    return [pytest.param(agent, marks=marks[agent in slow_ones]) for agent in agents]


@pytest.fixture
def measured(record_property):
    """Nats short of the best soft return, of every label; the worst goes into the report."""

    def measure(task, agent):
        found = list(shortfalls(task, agent, *SETTINGS.get((task, agent), [])).values())
        record_property("exact", json.dumps({"task": task, "agent": agent, "nats": max(found)}))
        return found

    return measure


@pytest.mark.parametrize("agent", slow(SOFT_AGENTS, SLOW_ON_GAUSSIAN))
def test_gaussian_optimum_is_reached(agent, measured):
    for nats in measured("gaussian", agent):
        assert abs(nats) <= 0.02


@pytest.mark.parametrize("agent", slow(SOFT_AGENTS, SLOW))
def test_mixture1d_floor_is_reached(agent, measured):
    # Nothing of fixed scale can do better than the floor (0.01 for Monte Carlo), and the agent must
    # come within 0.05 nats of it.
    for nats in measured("mixture1d", agent):
        assert -0.01 <= nats <= 0.05


@pytest.mark.science
@pytest.mark.parametrize(
    "agent",
    [
        *("ctrl", "alignprop", "adjoint", "nabla_db", "ppo", "grpo", "dpok"),
        *("tb", "vargrad", "pcl", "h_transform", "sac"),
        *(pytest.param(agent, marks=MISSES) for agent in ("reinforce", "rwr")),
    ],  # db and subtb miss it by 0.03 to 0.06 nats, see their pages
)
def test_mixture2d_gap(agent, measured):
    for nats in measured("mixture2d", agent):
        assert nats <= 0.30


# Agents that do not compare episodes of one condition take a number as the control.
OF_NUMBERS = [
    agent for agent in SOFT_AGENTS if agent not in ("grpo", "vargrad", "rwr", "d3po", "h_transform")
]
FAST = ("ctrl", "reinforce", "tb", "adjoint")


@pytest.mark.parametrize("agent", slow(OF_NUMBERS, {*OF_NUMBERS} - {*FAST}))
def test_gaussian_mean_optimum_is_reached_at_random_numbers(agent, measured):
    found = measured("gaussian_mean", agent)
    assert len(found) == 16 and max(found) <= 0.02 and min(found) >= -0.001


@pytest.fixture(scope="module")
def gaussian_process():
    return build.build_process(compose("train", ["env=gaussian"]))


def test_gap_of_the_closed_form_optimum_is_the_start_law_term(gaussian_process):
    process = gaussian_process
    plan = EvaluationPlan(prior_samples=4096, policy_samples=20_000, exact_samples=0)
    summary = evaluate(PolicySampler(process, ShiftPolicy(process)), plan).summary
    assert summary["contradictions"] == []
    for label, row in enumerate(summary["per_label"].values()):
        oracle = gaussian_oracle(process, label)
        assert row["gap_nats"] == pytest.approx(oracle.start_law_term, abs=0.01)
        assert row["log_z"] == pytest.approx(oracle.log_z, abs=0.01)
        assert row["ess"] > 0.99
        assert row["gap_nats_certified"] is None, "a linear reward has no upper bound"


@pytest.mark.parametrize("factor", [0.8, 0.9])
def test_gap_of_a_known_policy(gaussian_process, factor):
    """Shifts scaled by f leave the gap (1 - f)^2 sum_k |shift_k|^2 / 2 scale_k^2 + start law."""
    process = gaussian_process
    plan = EvaluationPlan(prior_samples=20_000, policy_samples=20_000, exact_samples=0)
    rows = (
        evaluate(PolicySampler(process, ShiftPolicy(process, factor)), plan)
        .summary["per_label"]
        .values()
    )
    scale = torch.as_tensor(scales(process))
    for label, row in enumerate(rows):
        oracle = gaussian_oracle(process, label)
        shifts = torch.as_tensor(oracle.optimal_shifts)
        missing = (1 - factor) ** 2 * (shifts.square().sum(1) / (2 * scale**2)).sum()
        truth = float(missing) + oracle.start_law_term
        assert row["gap_nats"] == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("estimator", ["prior", "policy"])
def test_log_z_intervals_hold_the_truth(gaussian_process, estimator):
    """Estimators A and B: at least 90 of 100 intervals of 95 % hold log Z."""
    process = gaussian_process
    truth = gaussian_oracle(process, 0).log_z
    policy = PriorPolicy(process.kernel) if estimator == "prior" else ShiftPolicy(process, 0.7)
    held = 0
    with torch.no_grad():
        for seed in range(100):
            episode = rollout(
                LatentEnv(process, num_envs=2000, seed=seed), policy, control={"direction": 0}
            )
            estimate = log_mean_exp(episode_reward(episode) - episode_log_ratio(episode))
            held += estimate.low <= truth <= estimate.high
    assert held >= 90


def test_accepted_trajectories_have_the_conditional_law():
    """Rejection on mixture1d: the accepted samples' mean is the exact conditional's."""
    process = build.build_process(compose("train", ["env=mixture1d"]))
    plan = EvaluationPlan(prior_samples=20_000, policy_samples=3, exact_samples=20_000)
    evaluation = evaluate(PolicySampler(process, PriorPolicy(process.kernel)), plan)
    prior = evaluation.samples["prior"][0][:, 0].double()
    for label in range(2):
        control = {"group": torch.full((len(prior),), label)}
        weights = process.reward(prior[:, None].float(), control).double().softmax(0)
        accepted = evaluation.samples["exact"][label][:, 0].double()
        error = accepted.std() / len(accepted) ** 0.5
        assert abs(accepted.mean() - (weights * prior).sum()) < 4 * error


def test_control_variate_leaves_the_soft_return_unbiased(gaussian_process):
    process = gaussian_process
    policy = ShiftPolicy(process, 0.5)
    plan = EvaluationPlan(prior_samples=2, policy_samples=50_000, exact_samples=0)
    row = evaluate(PolicySampler(process, policy), plan).summary["per_label"]["direction=0"]
    oracle = gaussian_oracle(process, 0)
    scale = torch.as_tensor(scales(process))
    shifts = torch.as_tensor(oracle.optimal_shifts)
    missing = 0.25 * (shifts.square().sum(1) / (2 * scale**2)).sum()
    truth = oracle.optimal_soft_return - float(missing)
    low, high = row["soft_return_ci"]
    assert low - 0.005 <= truth <= high + 0.005
