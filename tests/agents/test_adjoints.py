"""Adjoint matching and detailed balance of gradients against closed forms; their memory."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from agent_tasks import StepShifts, make, noisy_drift, oracles, task_of
from batches import prepared
from exact_tasks import ShiftPolicy
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.adjoint import Adjoint
from ctrl_rl.agents.nabla_db import NablaDB
from ctrl_rl.agents.parts.adjoints import lean_adjoint, log_ratio_gradient, reward_gradient
from ctrl_rl.agents.parts.critics import GradientNetwork
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.gaussian import expand_to
from ctrl_rl.learning.replay import Replay
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy

K = 6
MEMORY = Path(__file__).parents[2] / "docs" / "memory.py"


# --- the lean adjoint --------------------------------------------------------------------------


def full_adjoint(
    process: DenoisingProcess, policy: DenoisingPolicy, episode: TensorDict, first: int
) -> Tensor:
    """d (reward - later KLs) / d x_first along the episode's noise, by autograd: [B, *S]."""
    control = dict(episode[keys.CONTROL][:, 0].items())
    start = episode[keys.ACTION][:, first - 1].clone().requires_grad_(True)
    x, kl = start, torch.zeros(())
    for k in range(first, process.num_steps):
        step = torch.full((len(x),), k)
        prior_loc = process.prior_loc(x, step, {})
        loc = policy.loc(x, step, control, prior_loc)
        wide = expand_to(process.kernel.scale[step], x)
        kl = kl + ((loc - prior_loc) / wide).square().sum() / 2
        x = loc + (episode[keys.ACTION] - episode[keys.LOC])[:, k]
    clean = process.prior_loc(x, torch.full((len(x),), process.num_steps), {})
    target = process.reward(process.prior.decode(clean), control).sum() - kl
    return torch.autograd.grad(target, start)[0]


@pytest.mark.parametrize("task", ["gaussian", "mixture2d"])
def test_lean_adjoint_is_the_full_one(task: str) -> None:
    """At the linear task's optimum, and of any chain without drift."""
    env = make(task, 16)
    policy = ShiftPolicy(env.process) if task == "gaussian" else PriorPolicy(env.process.kernel)
    with torch.no_grad():
        episode = rollout(env, policy)
    lean = lean_adjoint(RolledChain(env, policy), episode)
    for k in range(K):
        full = full_adjoint(env.process, policy, episode, k + 1)
        torch.testing.assert_close(lean[:, k], full, rtol=1e-4, atol=1e-6)


def test_lean_adjoint_is_the_gradient_of_the_soft_value() -> None:
    env = make("gaussian", 16)
    policy = StepShifts(env.process)
    with torch.no_grad():
        episode = rollout(env, policy)
    weights = torch.as_tensor(np.stack([o.value_weights[1:] for o in oracles(env.process)]))
    exact = weights.float()[episode[keys.CONTROL, "direction"][:, 0]]
    lean = lean_adjoint(RolledChain(env, policy), episode)
    torch.testing.assert_close(lean, exact, rtol=1e-4, atol=1e-5)


# --- adjoint matching --------------------------------------------------------------------------


def test_adjoint_loss_and_its_gradient_vanish_at_the_optimum() -> None:
    env = make("gaussian", 64)
    policy = StepShifts(env.process)
    with torch.no_grad():
        policy.shifts.copy_(ShiftPolicy(env.process).shifts)
    agent = Adjoint(task=task_of(env.process), steps_at_once=K)
    loss = agent.loss(prepared(env, policy, agent))["loss_adjoint"]
    assert loss.item() < 1e-8
    (gradient,) = torch.autograd.grad(loss, policy.shifts)
    assert gradient.abs().max() < 1e-4
    with torch.no_grad():
        policy.shifts.zero_()
    costs = agent.loss(prepared(env, policy, agent))["loss_adjoint"]
    # Balanced labels: the mean over labels of the optimum's KL.
    exact = [(o.optimal_shifts**2).sum(1) @ (1 / (2 * o.sigmas**2)) for o in oracles(env.process)]
    assert costs.item() == pytest.approx(np.mean(exact), rel=0.05)


def test_adjoint_gradient_does_not_depend_on_the_pieces() -> None:
    env = make("mixture1d", 32)
    policy = noisy_drift(env, "mixture1d")
    gradients = []
    for steps_at_once in (K, 4, 1):
        agent = Adjoint(task=task_of(env.process), steps_at_once=steps_at_once)
        env.generator.manual_seed(0)
        total = torch.zeros(())
        for pieces in Replay(agent.plan, env.generator).batches(
            prepared(env, policy, agent), policy
        ):
            for piece in pieces:
                total = total + agent.loss(piece)["loss_adjoint"]
        gradients.append(torch.autograd.grad(total, list(policy.parameters())))
    for other in gradients[1:]:
        for one, another in zip(gradients[0], other, strict=True):
            error = (one - another).norm() / gradients[0][-1].norm()
            assert error < 1e-5


# --- detailed balance of gradients -------------------------------------------------------------


def test_log_ratio_gradient_is_the_derivative() -> None:
    env = make("mixture2d", 8)
    policy = noisy_drift(env, "mixture2d")
    with torch.no_grad():
        episode = rollout(env, policy)
    found = log_ratio_gradient(RolledChain(env, policy), episode)
    direction = torch.randn(episode[keys.X].shape, generator=torch.Generator().manual_seed(1))
    control = dict(episode[keys.CONTROL][:, 0].items())

    @torch.no_grad()
    def log_ratio(x: Tensor, k: int) -> Tensor:
        step = torch.full((len(x),), k)
        prior_loc = env.process.prior_loc(x, step, {})
        laws = (policy.loc(x, step, control, prior_loc), prior_loc)
        wide = expand_to(env.process.kernel.scale[step], x)
        return_of = [torch.distributions.Normal(loc.double(), wide.double()) for loc in laws]
        ours, priors = (law.log_prob(episode[keys.ACTION][:, k].double()) for law in return_of)
        return (ours - priors).sum(1)

    size = 1e-3
    for k in range(K):
        x, move = episode[keys.X][:, k], size * direction[:, k]
        slope = (log_ratio(x + move, k) - log_ratio(x - move, k)) / (2 * size)
        exact = (found[:, k] * direction[:, k]).sum(1).double()
        torch.testing.assert_close(slope, exact, rtol=2e-2, atol=2e-2)


def test_reward_gradient_of_the_last_action_is_the_adjoint() -> None:
    env = make("mixture2d", 8)
    policy = noisy_drift(env, "mixture2d")
    with torch.no_grad():
        episode = rollout(env, policy)
    chain = RolledChain(env, policy)
    guess, lean = reward_gradient(chain, episode), lean_adjoint(chain, episode)
    torch.testing.assert_close(guess[:, -1], lean[:, -1])


def test_nabla_db_losses_vanish_at_the_optimum() -> None:
    """Both conditions hold at every state and action there, with a residual of 0."""
    env = make("gaussian", 64)
    policy = StepShifts(env.process)
    with torch.no_grad():
        policy.shifts.copy_(ShiftPolicy(env.process).shifts)
    agent = NablaDB(task=task_of(env.process), critic=GradientNetwork)
    losses = agent.loss(prepared(env, policy, agent))
    assert losses["loss_nabla_db"].item() < 1e-8 and losses["loss_flow"].item() < 1e-8
    gradients = torch.autograd.grad(
        losses["loss_nabla_db"] + losses["loss_flow"],
        [policy.shifts, *agent.parameters()],
        allow_unused=True,
    )
    assert all(g is None or g.abs().max() < 1e-4 for g in gradients)


def test_reverse_condition_pulls_a_wrong_residual_back() -> None:
    """The loss that trains g alone finds the soft value's gradient again at the optimum."""
    env = make("gaussian", 64)
    agent = NablaDB(task=task_of(env.process), critic=GradientNetwork)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3
    episode = prepared(env, ShiftPolicy(env.process), agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    worst = []
    for _ in range(150):
        loss = agent.loss(episode)["loss_flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        worst.append(loss.item())
    assert worst[-1] < 1e-3 * worst[0]


# --- memory ------------------------------------------------------------------------------------


def test_adjoint_saves_as_much_for_eighty_steps_as_for_ten() -> None:
    """Saved for the backward pass; every agent's rollout holds K latents besides."""
    spec = importlib.util.spec_from_file_location("memory", MEMORY)
    assert spec is not None and spec.loader is not None
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    few, many = (memory.saved_mb(["agent=adjoint"], k) for k in (10, 80))
    assert many == pytest.approx(few, rel=0.1)
    words = ["agent=ctrl", "agent.checkpointing=true"]
    few, many = (memory.saved_mb(words, k) for k in (10, 30))
    assert many > 2 * few
