"""A budget in denoiser calls: counted in advance, kept, resumed."""

import itertools
import math

import pytest
import torch
from conftest import choices
from running import contents, metrics, summary, train

from ctrl_rl.agents.plan import in_force
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.learner import Learner, TrainerConfig
from ctrl_rl.learning.trainer import Trainer
from ctrl_rl.learning.update import rehearse
from ctrl_rl.runs.build import (
    build_agent,
    build_env,
    build_policy,
    build_process,
    build_trainer_config,
)
from ctrl_rl.runs.compose import compose

BUDGET = 1100


@pytest.mark.parametrize("agent", choices("agent"))
def test_every_agent_keeps_the_budget_within_one_update(agent):
    words = ["trainer.batch_size=8", f"trainer.denoiser_calls={BUDGET}"]
    config = compose("train", ["env=gaussian", f"agent={agent}", *words])
    process = build_process(config)
    policy, env = build_policy(config, process), build_env(config, process)
    learner = Learner(policy, build_agent(config, process), build_trainer_config(config))
    generator = env.generator.get_state()
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    state = {name: value.clone() for name, value in learner.state().items()}

    counted = rehearse(env, learner)
    assert (process.prior_calls, process.reward_calls, policy.calls) == (0, 0, 0)
    assert torch.equal(env.generator.get_state(), generator)
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in learner.state().items())
    assert all(parameter.grad is None for parameter in policy.parameters())

    learner.config = learner.config.within_budget(counted)
    trainer = Trainer(env, learner, log_z=torch.zeros(3))
    calls = [figures["denoiser_calls"] for figures in trainer]
    assert BUDGET - max(counted.values()) < calls[-1] <= BUDGET
    prices = [in_force(counted, update / len(calls)) for update in range(len(calls))]
    assert calls == list(itertools.accumulate(prices))
    assert set(prices) == set(counted.values()), "every plan has its turn"


def test_a_budget_is_spent_on_plans_by_their_shares():
    """As many updates as it pays for, found by trying all."""
    prices = {0.0: 3, 0.25: 10, 0.9: 1}
    for budget in range(3, 400):
        paid = TrainerConfig(denoiser_calls=budget).within_budget(prices).updates
        spent = [
            sum(in_force(prices, update / updates) for update in range(updates))
            for updates in (paid, paid + 1)
        ]
        assert spent[0] <= budget < spent[1]
    with pytest.raises(ConfigError, match="which takes 3"):
        TrainerConfig(denoiser_calls=2).within_budget(prices)


def test_the_schedule_runs_over_the_budget_and_resumes(tmp_path):
    # An update of 16 episodes: 8 steps and the read-out by the prior, 8 steps by the policy.
    budget = 20 * 16 * (9 + 8) + 5
    run = train(tmp_path, "run", f"trainer.denoiser_calls={budget}", "trainer.updates=3")
    assert summary(run)["denoiser_calls"] == budget - 5
    assert summary(run)["denoiser_calls_budget"] == budget
    factors = [line["learning_rate_factor"] for line in metrics(run)]
    assert factors == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 20) for k in range(20)])
    before = contents(run)
    assert main(["train", f"resume={run}", "checkpoint=10"]) == 0
    assert contents(run) == before
