"""Truncated chains and single-step branches against closed forms."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from agent_tasks import StepShifts, make, noisy_drift, oracles, task_of
from batches import learn, prepared, trained
from exact_tasks import ShiftPolicy, scales
from oracles import GaussianChainOracle
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.adjoint import Adjoint
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.alignprop import AlignProp
from ctrl_rl.agents.draft import Draft
from ctrl_rl.agents.draft_lv import DraftLV
from ctrl_rl.agents.nabla_db import NablaDB
from ctrl_rl.agents.parts.branches import anchor, branch_late
from ctrl_rl.agents.parts.critics import GradientNetwork
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.agents.refl import ReFL
from ctrl_rl.envs.rollout import RolledChain, rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.learning.checks import check_start
from ctrl_rl.learning.learner import Learner, TrainerConfig
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.runs.build import build_policy
from ctrl_rl.runs.compose import compose

K = 6


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
    rows = evaluate(PolicySampler(process, policy), plan).summary["per_label"].values()
    for oracle, row in zip(oracles(process), rows, strict=True):
        assert row["soft_return"] == pytest.approx(truncated_optimum(oracle, kept), abs=0.02)


def test_one_step_estimate_has_the_soft_values_gradient_on_the_gaussian_task() -> None:
    """Why refl's own optimum is the soft one there: both gradients are in closed form."""
    process = make("gaussian", 1).process
    for label, oracle in enumerate(oracles(process)):
        for k in range(1, K + 1):
            x = torch.zeros(1, *process.shape, requires_grad=True)
            estimate = process.clean_estimate(x, torch.tensor([k]), {})
            reward = process.reward(estimate, {"direction": torch.tensor([label])})
            (gradient,) = torch.autograd.grad(reward.sum(), x)
            exact = torch.as_tensor(oracle.value_weights[k]).float()
            torch.testing.assert_close(gradient[0], exact, rtol=1e-4, atol=1e-6)


class Watched(PriorPolicy):
    """The prior's policy, which remembers what it was asked."""

    def __init__(self, kernel: TransitionKernel) -> None:
        super().__init__(kernel)
        self.asked: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        self.asked.append((x, step, dict(control)))
        return prior_loc


def test_noisy_copies_follow_the_forward_process() -> None:
    copies, n = 3, 2000
    env = make("mixture2d", n)
    policy = Watched(env.process.kernel)
    episode = prepared(env, policy, DraftLV(renoise=copies))
    x, step, control = policy.asked[-2]  # the anchor is asked for last
    assert step.tolist() == [K - 1] * (n * copies)
    label = episode[keys.CONTROL, "group"][:, 0]
    assert torch.equal(control["group"].view(n, copies), label[:, None].expand(n, copies))
    clean = episode[keys.SAMPLE][:, :1]  # latents of this task are samples
    kernel = env.process.kernel
    noise = (x.view(n, copies, 2) - kernel.signal[K - 1] * clean) / kernel.noise[K - 1]
    assert noise.mean().abs() < 4 / (2 * n * copies) ** 0.5
    assert noise.var() == pytest.approx(1, abs=4 * (2 / (2 * n * copies)) ** 0.5)
    covariance = (noise[:, 0] * noise[:, 1]).mean()
    assert covariance.abs() < 4 / (2 * n) ** 0.5, "copies are independent"


@pytest.mark.parametrize("agent", [DraftLV(renoise=3), ReFL(one_step_of=2)], ids=["lv", "refl"])
def test_rollout_beside_a_branch_is_the_whole_episode(agent: Agent) -> None:
    env = make("mixture2d", 8)
    policy = noisy_drift(env, "mixture2d")
    episode = prepared(env, policy, agent)
    env.generator.manual_seed(0)
    plain = rollout(env, policy, plan=RolloutPlan(gradients=None))
    for key in (keys.NEXT_REWARD, keys.KL, keys.ACTION, keys.SAMPLE):
        assert torch.equal(episode[key], plain[key]) and not episode[key].requires_grad
    for key in ("branch_reward", "branch_kl", "anchor_kl"):
        assert episode[key].shape == (8, K) and episode[key].requires_grad
        assert ((episode[key] != 0).any(0)).sum() == 1


def test_branch_at_the_last_step_averages_copies_of_the_soft_return_to_go() -> None:
    """From the true x_{K-1} the branch is one more draw of the last step: the same in the mean."""
    env = make("mixture2d", 20_000)
    policy = noisy_drift(env, "mixture2d")
    episode = branch_late(RolledChain(env, policy), rollout(env, policy), last=1).detach()
    again = (episode["branch_reward"] - episode["branch_kl"])[:, -1]
    first = episode[keys.NEXT_REWARD][:, -1, 0] - episode[keys.KL][:, -1]
    difference = again - first
    assert difference.mean().abs() < 4 * difference.std() / len(difference) ** 0.5
    torch.testing.assert_close(episode["branch_kl"][:, -1], episode[keys.KL][:, -1])


def test_anchor_is_the_kl_out_of_sight_in_the_mean() -> None:
    env = make("mixture2d", 4)
    policy = noisy_drift(env, "mixture2d")
    episode, chain = rollout(env, policy), RolledChain(env, policy)
    draws = torch.stack([anchor(chain, episode, last=2)["anchor_kl"] for _ in range(200)])
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
        {"truncation": 0},
        {"truncation": "unifrom"},
        {"reevaluate": True},
        {"reevaluate": True, "gradients": None},
        {"epochs": 2},
        {"step_chunks": 2, "gradients": None},
        {"replay": 2, "gradients": None},
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
