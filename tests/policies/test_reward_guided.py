"""Guidance by the reward: nothing at the start, exact where the answer is known, any policy."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.api import make_process
from ctrl_rl.build import build_policy
from ctrl_rl.composition import compose
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.errors import ConfigError
from ctrl_rl.plans import RolloutPlan
from ctrl_rl.policies import PriorPolicy, RewardGuidedPolicy
from ctrl_rl.rollouts import rollout


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return make_process("faces", ["kernel.num_steps=4"])


def guided(process: DenoisingProcess, weight: float) -> RewardGuidedPolicy:
    made = RewardGuidedPolicy(policy=PriorPolicy(process.kernel), value=process.value_of_clean)
    torch.nn.init.constant_(made.weights.weight, weight)
    return made


def state(process: DenoisingProcess, k: int, **asked: str) -> tuple:
    x = torch.randn(3, *process.shape, generator=torch.Generator().manual_seed(0))
    step = torch.full((3,), k)
    control = process.check_control(asked, 3)
    with torch.no_grad():
        return x, step, control, process.prior_loc(x, step, control)


def test_the_drift_is_the_weight_times_the_gradient_at_the_clean_estimate(
    process: DenoisingProcess,
) -> None:
    x, step, control, prior_loc = state(process, 2, glasses="yes", hat="no")
    clean = process.clean_estimate(x, step, control).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(process.reward(clean, control).sum(), clean)
    loc = guided(process, 0.7).loc(x, step, control, prior_loc)
    wanted = prior_loc + 0.7 * process.kernel.scale[2] * gradient
    assert (gradient.flatten(1).norm(dim=1) > 0.01).all()
    torch.testing.assert_close(loc, wanted, rtol=1e-4, atol=1e-5)


def test_a_small_step_along_the_drift_raises_the_reward(process: DenoisingProcess) -> None:
    x, step, control, prior_loc = state(process, 3, glasses="yes", hat="yes")
    kernel = process.kernel
    before, after = (
        process.reward(kernel.denoised(x, loc.detach(), step), control)
        for loc in (prior_loc, guided(process, 0.1).loc(x, step, control, prior_loc))
    )
    assert (after > before).all()


def test_gradients_flow_through_the_guidance(process: DenoisingProcess) -> None:
    """Central differences of the soft return in one weight agree with autograd."""
    made = guided(process, 0.2).double()
    env = LatentEnv(process, num_envs=4)

    def soft_return() -> Tensor:
        env.set_seed(3)
        path = rollout(env, made, plan=RolloutPlan(gradients="pathwise"))
        return (path["next", "reward"].sum((1, 2)) - path[keys.KL].sum(1)).mean()

    (gradient,) = torch.autograd.grad(soft_return(), made.weights.weight)
    for k in range(process.num_steps):
        values = []
        for shift in (1e-2, -2e-2):
            with torch.no_grad():
                made.weights.weight[k] += shift
                values.append(soft_return())
        with torch.no_grad():
            made.weights.weight[k] += 1e-2
        numeric = (values[0] - values[1]) / 2e-2
        torch.testing.assert_close(gradient[k, 0].float(), numeric, rtol=0.02, atol=2e-3)


@torch.no_grad()
def test_nothing_asked_is_the_prior_bit_for_bit(process: DenoisingProcess) -> None:
    nothing = {"glasses": "any", "hat": "any"}
    drawn, prior = (
        rollout(LatentEnv(process, num_envs=4, seed=3), each, control=nothing)[keys.SAMPLE]
        for each in (guided(process, 0.5), PriorPolicy(process.kernel))
    )
    assert torch.equal(drawn, prior)


def test_a_copy_shares_the_reward_and_nothing_else(process: DenoisingProcess) -> None:
    made = guided(process, 0.5)
    copy = deepcopy(made)
    assert copy._value.__self__ is process
    torch.nn.init.zeros_(copy.weights.weight)
    assert (made.weights.weight == 0.5).all()
    assert set(made.state_dict()) == {"weights.weight"} | {
        f"{where}kernel.{name}" for name in made.kernel.state_dict() for where in ("", "policy.")
    }


@pytest.mark.parametrize("policy", ["side_network", "fine_tuned", "low_rank"])
def test_any_policy_is_guided(policy: str) -> None:
    words = ["env=digits", f"policy={policy}", "guidance=reward", "kernel.num_steps=3"]
    words += ["policy.targets=[conv1]"] if policy == "low_rank" else []
    config = compose("train", words)
    digits = make_process("digits", words[1:])
    made = build_policy(config, digits)
    assert "guidance" in made.parameter_groups()
    path = rollout(LatentEnv(digits, num_envs=2), made, plan=RolloutPlan(gradients="pathwise"))
    assert not path[keys.KL].any()
    path["next", "reward"].sum().backward()
    assert made.weights.weight.grad.abs().sum() > 0


def test_a_reward_without_gradient_is_refused() -> None:
    with pytest.raises(ConfigError, match="guidance=none"):
        RewardGuidedPolicy(policy=PriorPolicy(make_process("mixture2d").kernel), value=None)
