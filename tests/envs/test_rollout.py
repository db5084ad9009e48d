"""Rollouts: keys, identities, where gradients flow, and the soft return against its optimum."""

from typing import Any

import pytest
import torch
from oracles import GaussianChainOracle
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.conditions import label_counts
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import check_invariants, rollout
from ctrl_rl.errors import InvariantError
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.runs.loaded import make_env

K = 5


class Shifts(DenoisingPolicy):
    """One trainable shift of the mean per step and label, in latent units."""

    def __init__(self, kernel: TransitionKernel, shifts: Tensor) -> None:
        super().__init__(kernel)
        self.shifts = torch.nn.Parameter(shifts)  # [K, L, d]

    def mean(self, x: Tensor, step: Tensor, control: Any, prior_loc: Tensor) -> Tensor:
        (label,) = control.values()
        return prior_loc + self.shifts[step, label]


def make(task: str, num_envs: int, seed: int = 0) -> LatentEnv:
    return make_env(task, num_envs=num_envs, seed=seed, overrides=[f"kernel.num_steps={K}"])


def shifted(env: LatentEnv, size: float = 0.05) -> Shifts:
    (num_labels,) = label_counts(env.process.controls).values()
    generator = torch.Generator().manual_seed(0)
    shape = (K, num_labels, *env.process.shape)
    return Shifts(env.process.kernel, size * torch.randn(shape, generator=generator))


def soft_return(episode: Any) -> Tensor:
    total: Tensor = episode[keys.NEXT_REWARD].sum((1, 2)) - episode[keys.KL].sum(1)
    return total


def test_rollout_has_the_documented_shapes_and_dtypes() -> None:
    env = make("mixture2d", 3)
    episode = rollout(env, shifted(env))
    assert episode.batch_size == (3, K)
    for key, shape, dtype in (
        (keys.X, (2,), torch.float32),
        (keys.STEP, (), torch.int64),
        ((keys.CONTROL, "group"), (), torch.int64),
        (keys.ACTION, (2,), torch.float32),
        (keys.LOC, (2,), torch.float32),
        (keys.SCALE, (), torch.float32),
        (keys.ACTION_LOG_PROB, (), torch.float32),
        (keys.PRIOR_LOC, (2,), torch.float32),
        (keys.PRIOR_LOG_PROB, (), torch.float32),
        (keys.KL, (), torch.float32),
        (keys.LOG_RATIO, (), torch.float32),
        (keys.NEXT_REWARD, (1,), torch.float32),
        (keys.NEXT_DONE, (1,), torch.bool),
        (keys.SAMPLE, (2,), torch.float32),
    ):
        assert episode[key].shape == (3, K, *shape), key
        assert episode[key].dtype == dtype, key
        assert not episode[key].requires_grad, key
    assert episode[keys.STEP].tolist() == [list(range(K))] * 3
    assert episode[keys.NEXT_DONE][..., 0].tolist() == [[False] * (K - 1) + [True]] * 3


def test_sample_is_a_view_without_memory_of_its_own() -> None:
    env = make("mixture2d", 3)
    sample = rollout(env, shifted(env))[keys.SAMPLE]
    assert sample.stride(1) == 0
    assert sample.untyped_storage().nbytes() == 3 * 2 * 4


def test_quantities_of_a_rollout_are_what_they_say() -> None:
    env = make("mixture2d", 64)
    episode = rollout(env, shifted(env, size=0.3))
    assert torch.equal(episode[keys.ACTION][:, :-1], episode[keys.X][:, 1:])
    scale = env.process.kernel.scale[episode[keys.STEP]]
    assert torch.equal(episode[keys.SCALE], scale)
    # All from the formulas of the normal law, in float64.
    action, loc, prior = (episode[key].double() for key in ("action", "loc", "prior_loc"))
    normal = torch.distributions.Normal
    wide = scale.double()[..., None]
    log_prob = normal(loc, wide).log_prob(action).sum(-1)
    prior_log_prob = normal(prior, wide).log_prob(action).sum(-1)
    kl = torch.distributions.kl_divergence(normal(loc, wide), normal(prior, wide)).sum(-1)
    for key, exact in (
        (keys.ACTION_LOG_PROB, log_prob),
        (keys.PRIOR_LOG_PROB, prior_log_prob),
        (keys.LOG_RATIO, log_prob - prior_log_prob),
        (keys.KL, kl),
    ):
        torch.testing.assert_close(episode[key].double(), exact, rtol=1e-4, atol=1e-4)
    assert (episode[keys.KL] > 0).all()


def test_every_state_of_a_rollout_holds_the_priors_mean() -> None:
    env = make("mixture2d", 4)
    episode = rollout(env, shifted(env))
    kernel, denoiser = env.process.kernel, env.process.prior.denoiser
    x, step = episode[keys.X].flatten(0, 1), episode[keys.STEP].flatten()
    mean, scale = kernel.moments(x, denoiser(x, kernel.timesteps[step]), step)
    torch.testing.assert_close(mean.unflatten(0, (4, K)), episode[keys.PRIOR_LOC])
    assert torch.equal(scale.unflatten(0, (4, K)), episode[keys.SCALE])


def test_log_ratio_is_the_kl_on_average() -> None:
    env = make("mixture2d", 20_000)
    episode = rollout(env, shifted(env, size=0.1))
    difference = (episode[keys.LOG_RATIO] - episode[keys.KL]).sum(1)
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5


def test_optimal_policy_earns_the_closed_form_optimum() -> None:
    n = 20_000
    env = make("gaussian", n)
    kernel, prior = env.process.kernel, env.process.prior
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    slopes, offsets = [], []
    for k, t in enumerate(kernel.timesteps):
        ends = kernel.mean(points, prior.denoiser(points, t.expand(2)), torch.tensor([k, k]))
        slopes.append(float(ends[1, 0] - ends[0, 0]))
        offsets.append(ends[0].tolist())
    weights = env.process.reward_model.get_buffer("weights")[:-1]
    oracles = [
        GaussianChainOracle(slopes, offsets, kernel.scale[:K].tolist(), row.tolist())  # type: ignore[arg-type]
        for row in weights
    ]
    optimal = torch.stack(
        [torch.as_tensor(oracle.optimal_shifts, dtype=torch.float32) for oracle in oracles], 1
    )
    for label, oracle in enumerate(oracles):
        policy = Shifts(kernel, optimal)
        with torch.no_grad():
            best = soft_return(rollout(env, policy, control={"direction": label}))
            prior_only = soft_return(
                rollout(env, PriorPolicy(kernel), control={"direction": label})
            )
        error = float(best.std()) / n**0.5
        assert abs(float(best.mean()) - oracle.optimal_soft_return) < 4 * error
        assert float(prior_only.mean()) < oracle.optimal_soft_return - 4 * error
        # log Z from the prior alone: log E[e^r], with its delta-method error.
        weight = (prior_only - prior_only.max()).exp()
        log_z = float(weight.mean().log() + prior_only.max())
        assert abs(log_z - oracle.log_z) < 4 * float(weight.std() / weight.mean()) / n**0.5


@pytest.mark.parametrize("task", ["gaussian", "mixture2d"])
def test_pathwise_gradient_is_the_derivative(task: str) -> None:
    gradients = []
    env = make(task, 32)
    policy = shifted(env)
    direction = torch.randn_like(policy.shifts)
    soft_return(rollout(env, policy, plan=RolloutPlan(gradients="pathwise"))).mean().backward()
    assert policy.shifts.grad is not None
    slope = float((policy.shifts.grad * direction).sum())
    for sign in (1, -1):
        env.set_seed(0)  # common random numbers
        with torch.no_grad():
            moved = Shifts(policy.kernel, policy.shifts + sign * 1e-2 * direction)
            gradients.append(float(soft_return(rollout(env, moved)).double().mean()))
    assert (gradients[0] - gradients[1]) / 2e-2 == pytest.approx(slope, rel=2e-2, abs=1e-3)


def reached(env: LatentEnv, truncation: int | str | None) -> list[bool]:
    """Which steps' shifts get a gradient."""
    policy = shifted(env)
    plan = RolloutPlan(gradients="pathwise", truncation=truncation)
    soft_return(rollout(env, policy, plan=plan)).sum().backward()
    assert policy.shifts.grad is not None
    return (policy.shifts.grad.abs().sum((1, 2)) > 0).tolist()


@pytest.mark.parametrize("length", [1, 2, K, K + 3])
def test_truncation_cuts_the_first_steps_off(length: int) -> None:
    kept = min(length, K)
    assert reached(make("mixture2d", 8), length) == [False] * (K - kept) + [True] * kept


def test_whole_chain_carries_the_gradient_by_default() -> None:
    assert reached(make("mixture2d", 8), None) == [True] * K


def test_truncated_gradient_is_that_of_the_chain_cut_at_a_state() -> None:
    length = 2
    env = make("mixture2d", 8)
    policy = shifted(env)
    plan = RolloutPlan(gradients="pathwise", truncation=length)
    episode = rollout(env, policy, plan=plan)
    soft_return(episode).mean().backward()

    # By hand: from the state at K - 2 on, with the noise of the rollout.
    process, kernel = env.process, env.process.kernel
    control = {"group": episode[keys.CONTROL, "group"][:, 0]}
    again = Shifts(kernel, policy.shifts.detach().clone())
    x, kl = episode[keys.X][:, K - length].detach(), torch.zeros(8)
    for k in range(K - length, K):
        step = torch.full((8,), k)
        prior_loc = kernel.mean(x, process.prior.denoiser(x, kernel.timesteps[step]), step)
        loc = again.loc(x, step, control, prior_loc)
        wide = gaussian.expand_to(kernel.scale[step], x)
        kl = kl + ((loc - prior_loc) / wide).square().sum(1) / 2
        noise = ((episode[keys.ACTION] - episode[keys.LOC])[:, k]).detach()
        x = loc + noise
    step = torch.full((8,), K)
    sample = kernel.mean(x, process.prior.denoiser(x, kernel.timesteps[step]), step)
    (process.reward(sample, control) - kl).mean().backward()
    torch.testing.assert_close(policy.shifts.grad, again.shifts.grad, rtol=1e-4, atol=1e-6)


def test_uniform_truncation_takes_every_length() -> None:
    env = make("mixture2d", 2)
    lengths = [sum(reached(env, "uniform")) for _ in range(60)]
    counts = [lengths.count(length) for length in range(1, K + 1)]
    assert sum(counts) == 60 and min(counts) >= 3


def test_divergence_has_a_gradient_of_its_own() -> None:
    env = make("mixture2d", 8)
    policy = shifted(env)
    episode = rollout(env, policy, plan=RolloutPlan(gradients="pathwise"))
    (gradient,) = torch.autograd.grad(episode[keys.KL].sum(), policy.shifts)
    # The KL is |shift|^2 / 2 sigma^2, whatever the latent: its gradient is known.
    counts = episode[keys.CONTROL, "group"][:, 0].bincount(minlength=4)
    exact = policy.shifts * counts[:, None] / env.process.kernel.scale[:K, None, None] ** 2
    torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-4)


def test_nothing_is_kept_without_a_plan_and_the_mode_is_restored() -> None:
    env = make("mixture2d", 4)
    policy = shifted(env)
    for plan in (None, RolloutPlan(gradients=None)):
        assert not rollout(env, policy, plan=plan)[keys.KL].requires_grad
        assert torch.is_grad_enabled()
    with torch.no_grad():
        rollout(env, policy, plan=RolloutPlan(gradients="pathwise"))
        assert not torch.is_grad_enabled()


def test_invariants_catch_a_policy_that_is_not_the_prior() -> None:
    env = make("mixture2d", 4)
    plan = RolloutPlan(gradients="pathwise")
    check_invariants(rollout(env, shifted(env, size=0.0), plan=plan), plan)
    with pytest.raises(InvariantError, match="exactly 0 is due"):
        check_invariants(rollout(env, shifted(env, size=1e-4), plan=plan), plan)
    with pytest.raises(InvariantError, match="no gradient"):
        check_invariants(rollout(env, shifted(env, size=0.0)), plan)
