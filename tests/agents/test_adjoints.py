"""Agents that use the reward's gradient: adjoints, truncated chains, branches; closed forms."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_tasks import ShiftPolicy, gaussian_oracle, scales
from learning import learn, trained
from oracles import GaussianChainOracle
from tensordict import TensorDict
from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.adjoints import lean_adjoint, log_ratio_gradient, reward_gradient
from ctrl_rl.agents.adjoint import Adjoint
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.alignprop import AlignProp
from ctrl_rl.agents.draft import Draft
from ctrl_rl.agents.draft_lv import DraftLV
from ctrl_rl.agents.nabla_db import NablaDB
from ctrl_rl.agents.refl import ReFL
from ctrl_rl.api import make_env
from ctrl_rl.branches import anchor_kl
from ctrl_rl.build import build_policy
from ctrl_rl.checks import check_start
from ctrl_rl.composition import compose
from ctrl_rl.critics import GradientNetwork
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.gaussian import expand_to
from ctrl_rl.learner import Learner, TrainerConfig
from ctrl_rl.plans import RolloutPlan, TaskSpec
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.replay import Replay
from ctrl_rl.rollouts import rollout

K = 6
MEMORY = Path(__file__).parents[2] / "docs" / "memory.py"


class StepShifts(DenoisingPolicy):
    """loc = prior_loc + shifts[label, k]: no parameter is shared by two steps."""

    def __init__(self, process: DenoisingProcess) -> None:
        super().__init__(process.kernel)
        (labels,) = process.controls.values()
        self.shifts = nn.Parameter(torch.zeros(labels, process.num_steps, *process.shape))

    def loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        (label,) = control.values()
        return prior_loc + self.shifts[label, step]


def make(task: str, num_envs: int, num_steps: int = K, seed: int = 0) -> LatentEnv:
    words = [f"kernel.num_steps={num_steps}"]
    return make_env(task, num_envs=num_envs, seed=seed, overrides=words)


def oracles(process: DenoisingProcess) -> list[GaussianChainOracle]:
    (labels,) = process.controls.values()
    return [gaussian_oracle(process, label) for label in range(labels)]


def task_of(process: DenoisingProcess) -> TaskSpec:
    return TaskSpec(shape=process.shape, num_steps=process.num_steps, controls=process.controls)


def noisy_drift(env: LatentEnv, task: str) -> DenoisingPolicy:
    """A network that steps share, moved off the prior."""
    config = compose("train", [f"env={task}", f"kernel.num_steps={env.process.num_steps}"])
    policy = build_policy(config, env.process)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


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
        prior_loc = process.prior_loc(x, step)
        loc = policy.loc(x, step, control, prior_loc)
        wide = expand_to(process.kernel.scale[step], x)
        kl = kl + ((loc - prior_loc) / wide).square().sum() / 2
        x = loc + (episode[keys.ACTION] - episode[keys.LOC])[:, k]
    clean = process.prior_loc(x, torch.full((len(x),), process.num_steps))
    target = process.reward(process.prior.decode(clean), control).sum() - kl
    return torch.autograd.grad(target, start)[0]


@pytest.mark.parametrize("task", ["gaussian", "mixture2d"])
def test_lean_adjoint_is_the_full_one(task: str) -> None:
    """At the linear task's optimum, and of any chain without drift."""
    env = make(task, 16)
    policy = ShiftPolicy(env.process) if task == "gaussian" else PriorPolicy(env.process.kernel)
    with torch.no_grad():
        episode = rollout(env, policy)
    lean = lean_adjoint(env.process, episode)
    for k in range(K):
        full = full_adjoint(env.process, policy, episode, k + 1)
        torch.testing.assert_close(lean[:, k], full, rtol=1e-4, atol=1e-6)


def test_lean_adjoint_is_the_gradient_of_the_soft_value() -> None:
    env = make("gaussian", 16)
    with torch.no_grad():
        episode = rollout(env, StepShifts(env.process))
    weights = torch.as_tensor(np.stack([o.value_weights[1:] for o in oracles(env.process)]))
    exact = weights.float()[episode[keys.CONTROL, "direction"][:, 0]]
    torch.testing.assert_close(lean_adjoint(env.process, episode), exact, rtol=1e-4, atol=1e-5)


# --- adjoint matching --------------------------------------------------------------------------


def test_adjoint_loss_and_its_gradient_vanish_at_the_optimum() -> None:
    env = make("gaussian", 64)
    policy = StepShifts(env.process)
    with torch.no_grad():
        policy.shifts.copy_(ShiftPolicy(env.process).shifts)
    agent = Adjoint(task=task_of(env.process), steps_at_once=K)
    loss = agent.loss(rollout(env, policy, plan=agent.plan))["loss_adjoint"]
    assert loss.item() < 1e-8
    (gradient,) = torch.autograd.grad(loss, policy.shifts)
    assert gradient.abs().max() < 1e-4
    with torch.no_grad():
        policy.shifts.zero_()
    costs = agent.loss(rollout(env, policy, plan=agent.plan))["loss_adjoint"]
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
            rollout(env, policy, plan=agent.plan), policy
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
    found = log_ratio_gradient(env.process, policy, episode)
    direction = torch.randn(episode[keys.X].shape, generator=torch.Generator().manual_seed(1))
    control = dict(episode[keys.CONTROL][:, 0].items())

    @torch.no_grad()
    def log_ratio(x: Tensor, k: int) -> Tensor:
        step = torch.full((len(x),), k)
        prior_loc = env.process.prior_loc(x, step)
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
    with torch.no_grad():
        episode = rollout(env, noisy_drift(env, "mixture2d"))
    guess, lean = reward_gradient(env.process, episode), lean_adjoint(env.process, episode)
    torch.testing.assert_close(guess[:, -1], lean[:, -1])


def test_nabla_db_losses_vanish_at_the_optimum() -> None:
    """Both conditions hold at every state and action there, with a residual of 0."""
    env = make("gaussian", 64)
    policy = StepShifts(env.process)
    with torch.no_grad():
        policy.shifts.copy_(ShiftPolicy(env.process).shifts)
    agent = NablaDB(task=task_of(env.process), critic=GradientNetwork)
    losses = agent.loss(agent.prepare(rollout(env, policy, plan=agent.plan)))
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
    episode = agent.prepare(rollout(env, ShiftPolicy(env.process), plan=agent.plan))
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    worst = []
    for _ in range(150):
        loss = agent.loss(episode)["loss_flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        worst.append(loss.item())
    assert worst[-1] < 1e-3 * worst[0]


# --- truncated chains and branches -------------------------------------------------------------


def trained_shifts(agent: Agent, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Learned and optimal shifts [labels, K, d] of the gaussian task, in standard deviations."""
    env = make("gaussian", 48, seed=seed)
    policy = StepShifts(env.process)
    config = TrainerConfig(
        updates=200, learning_rate={"network": 3e-2}, max_grad_norm=None, betas=(0.9, 0.99)
    )
    learn(env, Learner(policy, agent, config), config.updates)
    wide = torch.as_tensor(scales(env.process)).float()[:, None]
    return policy.shifts.detach() / wide, ShiftPolicy(env.process).shifts / wide


@pytest.mark.parametrize(
    ("agent", "kept"),
    [
        (AlignProp(), K),
        (Draft(truncation=3), 3),
        (Draft(truncation=K + 2), K),
        (DraftLV(renoise=2), 1),
        (ReFL(one_step_of=3), 3),
    ],
    ids=["alignprop", "draft", "draft_whole", "draft_lv", "refl"],
)
def test_kept_steps_reach_the_soft_optimum_and_the_others_stay(agent: Agent, kept: int) -> None:
    """With parameters for every step; v is linear, so the start of the kept steps is no matter."""
    found, optimal = trained_shifts(agent)
    expected = optimal * (torch.arange(K) >= K - kept)[:, None]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def truncated_optimum(oracle: GaussianChainOracle, kept: int) -> float:
    """E_prior[v_{K-L}(x_{K-L})], nats."""
    mean = np.zeros_like(oracle.reward_weights)
    first = len(oracle.sigmas) - kept
    for slope, offset in zip(oracle.slopes[:first], oracle.offsets[:first], strict=True):
        mean = slope * mean + offset
    return float(oracle.value_weights[first] @ mean + oracle.value_constants[first])


@pytest.mark.parametrize(
    ("name", "word", "kept"),
    [("draft", "agent.truncation=3", 3), ("refl", "agent.one_step_of=5", 5)],
)
def test_a_shared_network_does_not_drift_in_the_steps_out_of_sight(
    name: str, word: str, kept: int
) -> None:
    policy, process = trained("gaussian", name, word, "trainer.updates=250")
    plan = EvaluationPlan(prior_samples=2, policy_samples=20_000, exact_samples=0, batch_size=4096)
    rows = evaluate(process, policy, plan).summary["per_label"].values()
    for oracle, row in zip(oracles(process), rows, strict=True):
        assert row["soft_return"] == pytest.approx(truncated_optimum(oracle, kept), abs=0.02)


def test_one_step_estimate_has_the_soft_values_gradient_on_the_gaussian_task() -> None:
    """Why refl's own optimum is the soft one there: both gradients are in closed form."""
    process = make("gaussian", 1).process
    for label, oracle in enumerate(oracles(process)):
        for k in range(1, K + 1):
            x = torch.zeros(1, *process.shape, requires_grad=True)
            estimate = process.clean_estimate(x, torch.tensor([k]))
            reward = process.reward(estimate, {"direction": torch.tensor([label])})
            (gradient,) = torch.autograd.grad(reward.sum(), x)
            exact = torch.as_tensor(oracle.value_weights[k]).float()
            torch.testing.assert_close(gradient[0], exact, rtol=1e-4, atol=1e-6)


class Watched(PriorPolicy):
    """The prior's policy, which remembers what it was asked last."""

    def loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        self.asked = (x, step, dict(control))
        return prior_loc


def test_noisy_copies_follow_the_forward_process() -> None:
    copies, n = 3, 2000
    env = make("mixture2d", n)
    policy = Watched(env.process.kernel)
    episode = rollout(env, policy, plan=RolloutPlan(gradients="pathwise", renoise=copies))
    x, step, control = policy.asked
    assert step.tolist() == [K - 1] * (n * copies)
    label = episode[keys.CONTROL, "group"][:, 0]
    assert torch.equal(control["group"].view(n, copies), label[:, None].expand(n, copies))
    signal = env.process.kernel.alpha_bar[K - 1]
    clean = episode[keys.SAMPLE][:, :1]  # latents of this task are samples
    noise = (x.view(n, copies, 2) - signal.sqrt() * clean) / (1 - signal).sqrt()
    assert noise.mean().abs() < 4 / (2 * n * copies) ** 0.5
    assert noise.var() == pytest.approx(1, abs=4 * (2 / (2 * n * copies)) ** 0.5)
    covariance = (noise[:, 0] * noise[:, 1]).mean()
    assert covariance.abs() < 4 / (2 * n) ** 0.5, "copies are independent"


@pytest.mark.parametrize("agent", [DraftLV(renoise=3), ReFL(one_step_of=2)], ids=["lv", "refl"])
def test_rollout_beside_a_branch_is_the_whole_episode(agent: Agent) -> None:
    env = make("mixture2d", 8)
    policy = noisy_drift(env, "mixture2d")
    episode = rollout(env, policy, plan=agent.plan)
    env.generator.manual_seed(0)
    plain = rollout(env, policy, plan=RolloutPlan(gradients=None))
    for key in (keys.NEXT_REWARD, keys.KL, keys.ACTION, keys.SAMPLE):
        assert torch.equal(episode[key], plain[key]) and not episode[key].requires_grad
    for key in (keys.BRANCH_REWARD, keys.BRANCH_KL, keys.ANCHOR_KL):
        assert episode[key].shape == (8, K) and episode[key].requires_grad
        assert ((episode[key] != 0).any(0)).sum() == 1


def test_branch_at_the_last_step_averages_copies_of_the_soft_return_to_go() -> None:
    """From the true x_{K-1} the branch is one more draw of the last step: the same in the mean."""
    env = make("mixture2d", 20_000)
    policy = noisy_drift(env, "mixture2d")
    plan = RolloutPlan(gradients="pathwise", one_step_of=1)
    with torch.no_grad():
        episode = rollout(env, policy, plan=plan)
    again = (episode[keys.BRANCH_REWARD] - episode[keys.BRANCH_KL])[:, -1]
    first = episode[keys.NEXT_REWARD][:, -1, 0] - episode[keys.KL][:, -1]
    difference = again - first
    assert difference.mean().abs() < 4 * difference.std() / len(difference) ** 0.5
    torch.testing.assert_close(episode[keys.BRANCH_KL][:, -1], episode[keys.KL][:, -1])


def test_anchor_is_the_kl_out_of_sight_in_the_mean() -> None:
    env = make("mixture2d", 4)
    policy = noisy_drift(env, "mixture2d")
    plan = RolloutPlan(gradients="pathwise", truncation=2, anchor=True)
    episode = rollout(env, policy, plan=plan)
    draws = torch.stack([anchor_kl(policy, episode, plan, env.generator) for _ in range(200)])
    exact = (K - 2) * episode[keys.KL].detach() * (torch.arange(K) < K - 2)
    # Every draw holds one step's exact KL, and every step out of sight is drawn.
    for draw in draws:
        (k,) = (draw != 0).any(0).nonzero().flatten().tolist()
        torch.testing.assert_close(draw[:, k], exact[:, k], rtol=1e-5, atol=1e-7)
    share = (draws != 0).any(1).float().mean(0)
    assert share[: K - 2].min() > 0.15 and (share[K - 2 :] == 0).all()


AGENTS: dict[str, Callable[[TaskSpec], Agent]] = {
    "adjoint": lambda task: Adjoint(task=task, steps_at_once=2),
    "alignprop": lambda task: AlignProp(),
    "draft": lambda task: Draft(),
    "draft_lv": lambda task: DraftLV(),
    "nabla_db": lambda task: NablaDB(task=task, critic=GradientNetwork),
    "refl": lambda task: ReFL(),
}


@pytest.mark.parametrize("name", AGENTS)
def test_checks_before_the_first_update_accept_the_agent(name: str) -> None:
    env = make("mixture2d", 4)
    policy = build_policy(compose("train", ["env=mixture2d", f"kernel.num_steps={K}"]), env.process)
    agent = AGENTS[name](task_of(env.process))
    config = TrainerConfig(learning_rate={"network": 1e-3, "embedding": 1e-3, "critic": 1e-3})
    check_start(env, Learner(policy, agent, config))


@pytest.mark.parametrize(
    "settings",
    [
        {"one_step_of": 0},
        {"renoise": -1},
        {"one_step_of": 2, "renoise": 2},
        {"one_step_of": 2, "truncation": 2},
        {"one_step_of": 2, "gradients": "score"},
        {"anchor": True},
        {"anchor": True, "truncation": "uniform"},
    ],
    ids=str,
)
def test_plans_that_contradict_themselves_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RolloutPlan(**{"gradients": "pathwise", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make_agent",
    [lambda: Draft(truncation=0), lambda: DraftLV(renoise=0), lambda: ReFL(one_step_of=0)],
)
def test_agents_refuse_options_out_of_range(make_agent: Callable[[], Agent]) -> None:
    with pytest.raises(ConfigError, match="0"):
        make_agent()


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
