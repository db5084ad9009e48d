"""Agents of one's own: what the contract asks for is named before the first update."""

import pytest
import torch
from agent_tasks import make, noisy_drift
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.errors import ConfigError, InvariantError
from ctrl_rl.learning.checks import check_start
from ctrl_rl.learning.learner import Learner, TrainerConfig
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.rewards import FunctionReward
from ctrl_rl.runs.build import build_agent, build_process
from ctrl_rl.runs.compose import compose

K = 4


class Own(Agent):
    plan = RolloutPlan(gradients="score")

    def loss(self, rollout: TensorDict) -> TensorDict:
        return TensorDict({"loss_own": rollout[keys.KL].sum()}, [])


class ReadsWhatIsNotThere(Own):
    def loss(self, rollout: TensorDict) -> TensorDict:
        return TensorDict({"loss_own": rollout["action_logprob"].sum()}, [])


class PreparesFromWhatIsNotThere(Own):
    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        return rollout.copy().set("mine", rollout["smple"])


class ForgetsTheRollout(Own):
    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        rollout.set("mine", rollout[keys.KL])
        return None  # type: ignore[return-value]


class GivesNoTensorDict(Own):
    def loss(self, rollout: TensorDict) -> TensorDict:
        return {"loss_own": rollout[keys.KL].sum()}  # type: ignore[return-value]


class GivesNoLoss(Own):
    def loss(self, rollout: TensorDict) -> TensorDict:
        return TensorDict({"own": rollout[keys.KL].sum()}, [])


class DifferentiatesTheReward(Own):
    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        sample = rollout[keys.SAMPLE][:, -1].clone().requires_grad_()
        reward = chain.reward(sample, dict(rollout[keys.CONTROL][:, -1].items()))
        (gradient,) = torch.autograd.grad(reward.sum(), sample)
        return rollout.copy().set("mine", gradient[:, None].expand(-1, K, -1))


def tried(agent: Agent, env: LatentEnv) -> None:
    policy = noisy_drift(env, "gaussian")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    config = TrainerConfig(learning_rate={"network": 1e-3, "embedding": 1e-3})
    check_start(env, Learner(policy, agent, config))


@pytest.mark.parametrize(
    ("agent", "sentence"),
    [
        (ReadsWhatIsNotThere(), "ReadsWhatIsNotThere reads 'action_logprob'.*action_log_prob"),
        (PreparesFromWhatIsNotThere(), "PreparesFromWhatIsNotThere reads 'smple'.*sample"),
        (ForgetsTheRollout(), "ForgetsTheRollout.prepare gave NoneType, not the rollout"),
        (GivesNoTensorDict(), "GivesNoTensorDict.loss gave dict, not a TensorDict"),
        (GivesNoLoss(), "GivesNoLoss.loss gave no loss; name at least one of its results loss_"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_agent_lacks_is_named(agent: Agent, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tried(agent, make("gaussian", 4, K))


class FillsTheMemory(Own):
    def loss(self, rollout: TensorDict) -> TensorDict:
        raise torch.OutOfMemoryError("simulated")


def test_a_first_loss_that_fills_the_memory_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="4 episodes and its loss do not fit .*microbatch=auto"):
        tried(FillsTheMemory(), make("gaussian", 4, K))


def test_plan_and_loss_are_enough() -> None:
    tried(Own(), make("gaussian", 4, K))


def squared(sample: Tensor, control: dict[str, Tensor]) -> Tensor:
    return -sample.detach().square().sum(1)


@pytest.mark.parametrize("says", [True, False])
def test_a_reward_that_cannot_be_differentiated_is_named(says: bool) -> None:
    """What claims to be differentiable and is not, and what an agent differentiates unasked."""
    process = make("gaussian", 4, K).process
    reward = FunctionReward(function=squared, controls={}, differentiable=says)
    process = DenoisingProcess(prior=process.prior, kernel=process.kernel, reward=reward)
    word = "says that it is differentiable" if says else "the agent differentiates FunctionReward"
    with pytest.raises(InvariantError, match=word):
        tried(DifferentiatesTheReward(), LatentEnv(process, num_envs=4))


class HasNoPlan(Agent):
    def loss(self, rollout: TensorDict) -> TensorDict:
        return TensorDict({"loss_own": rollout[keys.KL].sum()}, [])


def test_an_agent_without_a_plan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("train", ["env=gaussian", "agent=ctrl"])
    process = build_process(config)
    monkeypatch.setattr("ctrl_rl.agents.ctrl.HasNoPlan", HasNoPlan, raising=False)
    config.agent = {"_target_": "ctrl_rl.agents.ctrl.HasNoPlan"}
    with pytest.raises(ConfigError, match="HasNoPlan has no plan"):
        build_agent(config, process)


def test_every_call_of_a_chain_is_counted() -> None:
    env = make("gaussian", 4, K)
    policy = PriorPolicy(env.process.kernel)
    episode, chain = rollout(env, policy), RolledChain(env, policy)
    before = (env.process.prior_calls, env.process.reward_calls, policy.calls)
    x, step = episode[keys.X][:, 1], episode[keys.STEP][:, 1]
    control = dict(episode[keys.CONTROL][:, 1].items())
    prior_loc = chain.prior_loc(x, step, control)
    chain.clean_estimate(x, step, control)
    chain.policy_loc(x, step, control, prior_loc)
    chain.reward(chain.decode(x), control)
    spent = (env.process.prior_calls, env.process.reward_calls, policy.calls)
    assert [now - then for now, then in zip(spent, before, strict=True)] == [8, 4, 4]
