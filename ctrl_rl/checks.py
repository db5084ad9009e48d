"""What is asserted on one rollout before the first update, and of every reward after it."""

import torch
from tensordict import TensorDict

from ctrl_rl import keys
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import ConfigError, InvariantError, NonFiniteError, did_you_mean
from ctrl_rl.learner import Learner
from ctrl_rl.replay import Replay, check_refresh
from ctrl_rl.rollouts import check_invariants, rollout
from ctrl_rl.soft_returns import episode_reward


def check_start(env: LatentEnv, learner: Learner) -> None:
    """Contracts and invariants on one rollout of the untrained policy, which leaves no trace.

    Raises:
        ConfigError: prior, policy and reward do not fit each other, or the agent reads a key that
            rollouts do not have.
        InvariantError: the policy is not the prior, or a gradient that the agent needs is missing.
        NonFiniteError: a reward is not finite.
    """
    process, policy, agent = env.process, learner.policy, learner.agent
    before = env.generator.get_state()
    try:
        episode = rollout(env, policy, plan=agent.plan)
    except RuntimeError as error:  # torch's kind for shapes that do not fit
        reason = " ".join(str(error).split())
        raise ConfigError(f"prior, policy and reward do not fit each other: {reason}") from error
    env.generator.set_state(before)
    process.prior_calls = process.reward_calls = policy.calls = 0
    present = [str(key) for key in episode.keys(include_nested=True)]
    for key in agent.in_keys:
        if str(key) not in present:
            raise ConfigError(f"the agent reads '{key}'; {did_you_mean(str(key), present)}")
    check_invariants(episode, agent.plan)
    if agent.plan.recomputes:
        check_refresh(policy, episode)
        policy.calls = 0
    reward = episode[keys.BRANCH_REWARD] if agent.plan.branches else episode_reward(episode)
    if (
        agent.plan.gradients == "pathwise"
        and agent.needs_reward_gradient
        and not reward.requires_grad
    ):
        name = type(process.reward_model).__name__
        raise InvariantError(f"{name} says that it is differentiable, and its result has no graph")
    check_reward(env, episode)


def calls_per_update(env: LatentEnv, learner: Learner) -> int:
    """Evaluations of prior and policy in one update, counted in samples on a dry one.

    A dry update is a rollout and every batch of the agent's plan without a loss. It leaves no
    trace; `Agent.prepare` is left out, which sees neither prior nor policy and may keep a state.
    """
    process, policy, plan = env.process, learner.policy, learner.agent.plan
    before = env.generator.get_state()
    counted = (process.prior_calls, process.reward_calls, policy.calls)
    process.prior_calls = policy.calls = 0
    episode = rollout(env, policy, plan=plan)
    for pieces in Replay(plan, env.generator).batches(episode, policy):
        for _ in pieces:
            pass  # a piece calls the policy when it is made
    calls = process.prior_calls + policy.calls
    process.prior_calls, process.reward_calls, policy.calls = counted
    env.generator.set_state(before)
    return calls


def check_reward(env: LatentEnv, episode: TensorDict) -> None:
    """Raise `NonFiniteError` with the labels of the first reward that is not finite."""
    reward = episode_reward(episode)
    bad = (~torch.isfinite(reward)).nonzero()
    if len(bad):
        where = int(bad[0])
        labels = ", ".join(
            f"{name}={int(episode[keys.CONTROL, name][where, 0])}" for name in env.process.controls
        )
        raise NonFiniteError(f"the reward is {reward[where].item()} for {labels}")
