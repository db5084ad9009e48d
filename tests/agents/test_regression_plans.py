"""What RWR and NFT ask of the trainer: pieces along time, calls, settings that are refused."""

import pytest
from agent_tasks import make
from learning import learn

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.nft import Nft
from ctrl_rl.agents.rwr import RewardWeightedRegression
from ctrl_rl.build import build_policy
from ctrl_rl.checks import calls_per_update, check_start
from ctrl_rl.composition import compose
from ctrl_rl.errors import ConfigError
from ctrl_rl.learner import Learner, TrainerConfig
from ctrl_rl.plans import RolloutPlan

K = 4


@pytest.mark.parametrize(
    "agent",
    [
        RewardWeightedRegression(rollouts="prior"),
        RewardWeightedRegression(replay=64, minibatches=2),
        Nft(epochs=2, minibatches=2),
    ],
    ids=["rwr_prior", "rwr_replay", "nft"],
)
def test_checks_before_the_first_update_count_what_an_update_calls(agent: Agent) -> None:
    env = make("mixture2d", 4, num_steps=K)
    process = env.process
    policy = build_policy(compose("train", ["env=mixture2d", f"kernel.num_steps={K}"]), process)
    config = TrainerConfig(learning_rate={"network": 1e-3, "embedding": 1e-3})
    learner = Learner(policy, agent, config)
    check_start(env, learner)
    (foreseen,) = calls_per_update(env, learner).values()
    learn(env, learner, 1)
    assert process.prior_calls + policy.calls == foreseen


@pytest.mark.parametrize(
    ("make_agent", "name"),
    [
        (lambda: RewardWeightedRegression(rollouts="both"), "rollouts"),  # type: ignore[arg-type]
        (lambda: RewardWeightedRegression(replay=-1), "replay"),
        (lambda: Nft(advantage="reward"), "advantage"),  # type: ignore[arg-type]
        (lambda: Nft(beta=0.0), "beta"),
        (lambda: Nft(limit=-1.0), "limit"),
        (lambda: Nft(consistency=-0.1), "consistency"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make_agent, name):
    with pytest.raises(ConfigError, match=f"agent.{name}"):
        make_agent()


@pytest.mark.parametrize(
    ("gradients", "settings"),
    [
        ("pathwise", {"behaviour": "prior"}),
        ("score", {"behaviour": "both"}),
        ("pathwise", {"adds": ("forward_process",)}),
        (None, {"adds": ("forward_process",)}),
    ],
    ids=str,
)
def test_plans_that_contradict_themselves_are_refused(gradients, settings):
    with pytest.raises(ConfigError):
        RolloutPlan(gradients=gradients, **settings)
