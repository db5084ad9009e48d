"""What RWR and NFT ask of the trainer: pieces along time, calls, settings that are refused."""

import pytest
import torch
from agent_tasks import make, noisy_drift
from batches import learn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.nft import Nft
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.agents.rwr import RewardWeightedRegression
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.checks import check_start
from ctrl_rl.learning.learner import Learner, TrainerConfig
from ctrl_rl.learning.replay import refresh
from ctrl_rl.learning.update import rehearse
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.runs.build import build_policy
from ctrl_rl.runs.compose import compose

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
    (foreseen,) = rehearse(env, learner).values()
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
        ("pathwise", {"reevaluate": True}),
        (None, {"reevaluate": True}),
    ],
    ids=str,
)
def test_plans_that_contradict_themselves_are_refused(gradients, settings):
    with pytest.raises(ConfigError):
        RolloutPlan(gradients=gradients, **settings)


def test_behaviour_prior_acts_as_the_prior_and_evaluates_the_policy() -> None:
    env = make("mixture2d", 8)
    policy = noisy_drift(env, "mixture2d")
    episode = rollout(env, policy, plan=RolloutPlan(gradients="score", behaviour="prior"))
    env.generator.manual_seed(0)
    plain = rollout(env, PriorPolicy(env.process.kernel))
    for key in (keys.X, keys.ACTION, keys.NEXT_REWARD, keys.SAMPLE):
        assert torch.equal(episode[key], plain[key])
    assert torch.equal(episode[keys.BEHAVIOUR_LOC], episode[keys.PRIOR_LOC])
    again = refresh(policy, episode)
    for key in (keys.LOC, keys.KL, keys.LOG_RATIO, keys.ACTION_LOG_PROB):
        torch.testing.assert_close(episode[key], again[key], rtol=1e-4, atol=1e-5)
    (from_rollout, anew) = (
        torch.autograd.grad(each[keys.LOG_RATIO].sum(), next(policy.parameters()))[0]
        for each in (episode, again)
    )
    torch.testing.assert_close(from_rollout, anew, rtol=1e-3, atol=1e-4)
