"""What holds for every agent, a new yaml included."""

from collections.abc import Mapping

import pytest
import torch
from batches import first_batch, learn
from conftest import choices
from contract_tasks import K, config_of, permuted
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.agent import Phase
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.learning.learner import Learner
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.rewards import FunctionReward
from ctrl_rl.runs.build import build_agent, build_policy, build_process, build_trainer_config
from ctrl_rl.runs.compose import compose


def losses(agent: Phase, batch: TensorDict) -> dict[str, Tensor]:
    result = agent.loss(batch)
    assert all(value.shape == () and torch.isfinite(value) for value in result.values())
    return {str(key): value for key, value in result.items() if str(key).startswith("loss_")}


def perturbed(config: DictConfig, process: DenoisingProcess) -> DenoisingPolicy:
    """A policy that is not the prior, so that no loss is zero by accident."""
    policy = build_policy(config, process)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize("name", choices("agent"))
def test_every_phase_gives_losses_with_a_gradient(name: str) -> None:
    config = config_of("agent", name)
    process = build_process(config)
    policy, agent = perturbed(config, process), build_agent(config, process)
    for phase in agent.phases.values():
        batch = first_batch(LatentEnv(process, num_envs=32), policy, phase)
        found = losses(phase, batch)
        assert found, "no loss_* key"
        assert all(value.requires_grad for value in found.values())
        assert not {keys.CLEAN, keys.SAMPLE} & set(batch.keys()) or not phase.plan.makes_batches


@pytest.mark.parametrize("name", choices("agent"))
def test_agent_gradients(name: str) -> None:
    config = config_of("agent", name)
    process = build_process(config)
    policy, agent = perturbed(config, process), build_agent(config, process)
    batch = first_batch(LatentEnv(process, num_envs=32), policy, agent)
    found = losses(agent, batch)
    assert found, "no loss_* key"
    again = losses(agent, batch[permuted(len(batch))])
    for key, value in found.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-5)

    sum(found.values(), torch.zeros(())).backward()
    trained = [p for group in policy.parameter_groups().values() for p in group]
    assert any(p.grad is not None and (p.grad != 0).any() for p in trained)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained)
    assert all(p.grad is None for p in process.parameters())
    owned = [p for group in agent.parameter_groups().values() for p in group]
    assert {id(p) for p in owned} == {id(p) for p in agent.parameters() if p.requires_grad}
    assert set(agent.parameter_groups()) <= set(build_trainer_config(config).learning_rate)


@pytest.mark.parametrize("name", choices("agent"))
def test_agent_refuses_a_reward_without_the_gradient_it_needs(name: str) -> None:
    config = config_of("agent", name)
    process = build_process(config)
    needs_gradient = build_agent(config, process).needs_reward_gradient
    process.reward_model = FunctionReward(
        function=lambda sample, control: sample.detach().sum(1),
        controls=process.controls,
        differentiable=False,
    )
    if needs_gradient:
        with pytest.raises(ConfigError, match=f"agent={name} differentiates the reward"):
            build_agent(config, process)
    else:
        agent, policy = build_agent(config, process), perturbed(config, process)
        losses(agent, first_batch(LatentEnv(process, num_envs=8), policy, agent))


def near_one(sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
    return -(sample - 1).square().sum(1)


@pytest.mark.parametrize("controlled", [True, False])
@pytest.mark.parametrize("name", choices("agent"))
def test_agent_improves_on_the_prior(name: str, controlled: bool) -> None:
    words = ["trainer.updates=40", "trainer.schedule=constant", f"kernel.num_steps={K}"]
    config = compose("train", ["env=gaussian", f"agent={name}", *words])
    process = build_process(config)
    if not controlled:  # a reward that asks the same of all episodes
        process = DenoisingProcess(
            prior=process.prior,
            kernel=process.kernel,
            reward=FunctionReward(function=near_one, controls={}, differentiable=True),
        )
    policy, agent = build_policy(config, process), build_agent(config, process)
    settings = build_trainer_config(config)
    learn(LatentEnv(process, num_envs=128), Learner(policy, agent, settings), settings.updates)
    gains = []
    for each in (PriorPolicy(process.kernel), policy):
        env = LatentEnv(process, num_envs=4096, seed=1)  # the same starts, labels and noise
        with torch.no_grad():
            episode = rollout(env, each)
        gains.append(episode[keys.NEXT_REWARD].sum((1, 2)) - episode[keys.KL].sum(1))
    gain = gains[1] - gains[0]
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
