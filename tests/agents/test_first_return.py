"""Agents with values do not care where rewards lie: a constant added to all changes no gradient."""

import pytest
import torch
from batches import NO_CHAIN
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.critics import FirstReturn
from ctrl_rl.agents.parts.returns import mean_soft_return
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.runs.build import build_agent, build_policy, build_process
from ctrl_rl.runs.compose import compose

WITH_VALUES = ("tb", "pcl", "db", "subtb", "dpok", "ppo_critic", "sac")
WITHOUT = ("reinforce", "ppo", "grpo", "vargrad")
WORDS = ("env=gaussian", "kernel.num_steps=3")


def parts(name: str) -> tuple[Agent, list[Tensor], TensorDict]:
    """An agent, the policy's parameters and a rollout with its graph."""
    config = compose("train", [*WORDS, f"agent={name}"])
    process = build_process(config)
    policy = build_policy(config, process)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=GENERATOR.manual_seed(1))
    episodes = rollout(LatentEnv(process, num_envs=32), policy, plan=RolloutPlan(gradients="score"))
    return build_agent(config, process), list(policy.parameters()), episodes


GENERATOR = torch.Generator()


def policy_gradient(agent: Agent, parameters: list[Tensor], episodes: TensorDict) -> list[Tensor]:
    losses = agent.loss(agent.prepare(episodes, NO_CHAIN))
    total = sum(value for key, value in losses.items() if str(key).startswith("loss_"))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("name", [*WITH_VALUES, *WITHOUT])
def test_a_constant_added_to_all_rewards_changes_no_gradient(name: str) -> None:
    agent, parameters, episodes = parts(name)
    expected = policy_gradient(agent, parameters, episodes)
    moved = episodes.copy()
    moved.set(keys.NEXT_REWARD, episodes[keys.NEXT_REWARD] - 1000 * episodes[keys.NEXT_DONE])
    again, _, _ = parts(name)
    found = policy_gradient(again, parameters, moved)
    assert any(g is not None and (g != 0).any() for g in expected)
    size = max(float(g.abs().max()) for g in expected if g is not None)
    # float32 knows a reward near -1000 to 6e-5 nats
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4 * size)


@pytest.mark.parametrize("name", WITH_VALUES)
def test_the_first_rollout_decides_once(name: str) -> None:
    agent, _, episodes = parts(name)
    (first,) = [module for module in agent.modules() if isinstance(module, FirstReturn)]
    assert first.value == 0
    agent.prepare(episodes, NO_CHAIN)
    torch.testing.assert_close(first.value, mean_soft_return(episodes).detach())
    before = first.value.clone()
    moved = episodes.copy()
    moved.set(keys.NEXT_REWARD, episodes[keys.NEXT_REWARD] + 1.0)
    agent.prepare(moved, NO_CHAIN)
    assert first.value == before
    restored, _, _ = parts(name)
    restored.load_state_dict(agent.state_dict())
    restored.prepare(moved, NO_CHAIN)
    (first,) = [module for module in restored.modules() if isinstance(module, FirstReturn)]
    assert first.value == before
