"""Guidance by the reward: nothing at the start, exact where the answer is known, any policy."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from contract_tasks import K, config_of
from running import contents, interrupt, summary, train
from torch import Tensor

from ctrl_rl import keys, load_run
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.cli.main import main
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError, NonFiniteError
from ctrl_rl.policies import PriorPolicy, RewardGuidedPolicy, SideNetworkPolicy
from ctrl_rl.runs.build import build_policy, build_process
from ctrl_rl.runs.compose import compose
from ctrl_rl.runs.loaded import make_process

PATHWISE = RolloutPlan(gradients="pathwise")


@pytest.fixture(scope="module")
def process() -> DenoisingProcess:
    return make_process("faces", ["kernel.num_steps=4"])


def guided(
    process: DenoisingProcess, weight: float, value: Callable[..., Tensor] | None = None
) -> RewardGuidedPolicy:
    made = RewardGuidedPolicy(
        policy=PriorPolicy(process.kernel), value=value or process.value_of_clean
    )
    torch.nn.init.constant_(made.weights.weight, weight)
    return made


def state(
    process: DenoisingProcess, k: int, **asked: str
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
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
    drift = (loc - prior_loc) / process.kernel.scale[2]
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 1e-2
    torch.testing.assert_close(drift, 0.7 * gradient, rtol=1e-3, atol=1e-5)


def test_a_small_step_along_the_drift_raises_the_reward(process: DenoisingProcess) -> None:
    x, step, control, prior_loc = state(process, 3, glasses="yes", hat="yes")
    kernel = process.kernel
    before, after = (
        process.reward(kernel.denoised(x, loc.detach(), step), control)
        for loc in (prior_loc, guided(process, 0.1).loc(x, step, control, prior_loc))
    )
    assert (after > before).all() and (after - before).max() > 1e-3


def test_gradients_flow_through_the_guidance(process: DenoisingProcess) -> None:
    """Differences of the soft return agree with autograd, and not where a gradient is cut."""
    env = LatentEnv(process, num_envs=4)

    def soft_return(made: RewardGuidedPolicy) -> Tensor:
        env.set_seed(3)
        path = rollout(env, made, plan=PATHWISE)
        return (path["next", "reward"].sum((1, 2)) - path[keys.KL].sum(1)).mean()

    def gradient_of(made: RewardGuidedPolicy) -> Tensor:
        (gradient,) = torch.autograd.grad(soft_return(made), made.weights.weight)
        return gradient[:, 0]

    class Cut(RewardGuidedPolicy):
        def _gradient(self, clean: Tensor, control: Mapping[str, Tensor]) -> Tensor:
            return super()._gradient(clean.detach(), control)

    made = guided(process, 0.5)
    cut = Cut(policy=PriorPolicy(process.kernel), value=process.value_of_clean)
    cut.load_state_dict(made.state_dict())
    numeric = torch.zeros(process.num_steps)
    for k in range(process.num_steps):
        for sign in (1, -1):
            moved = deepcopy(made)
            with torch.no_grad():
                moved.weights.weight[k] += sign * 1e-2
                numeric[k] += sign * soft_return(moved) / 2e-2
    exact = gradient_of(made)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(exact, numeric, rtol=0.02, atol=5e-3)
    assert (gradient_of(cut) - numeric).abs().max() > 2e-2


@torch.no_grad()
def test_nothing_asked_is_the_prior_bit_for_bit(process: DenoisingProcess) -> None:
    nothing = {"glasses": "any", "hat": "any"}
    drawn, prior = (
        rollout(LatentEnv(process, num_envs=4, seed=3), each, control=nothing)[keys.SAMPLE]
        for each in (guided(process, 0.5), PriorPolicy(process.kernel))
    )
    assert torch.equal(drawn, prior)


def test_a_copy_shares_the_reward_and_nothing_else() -> None:
    digits = make_process("digits", ["kernel.num_steps=3"])
    side = SideNetworkPolicy(
        prior=digits.prior, kernel=digits.kernel, controls=digits.controls, width=8, depth=1
    )
    made = RewardGuidedPolicy(policy=side, value=digits.value_of_clean)
    torch.nn.init.constant_(made.weights.weight, 0.5)
    copy = deepcopy(made)
    assert copy._value.__self__ is digits  # type: ignore[attr-defined]
    theirs = dict(copy.named_parameters())
    for name, parameter in made.named_parameters():
        assert torch.equal(theirs[name], parameter)
        assert theirs[name].data_ptr() != parameter.data_ptr()
    assert not any("prior" in name or "reward" in name for name in made.state_dict())


@pytest.mark.parametrize("policy", ["side_network", "fine_tuned", "low_rank"])
def test_any_policy_is_guided(policy: str) -> None:
    words = ["env=digits", f"policy={policy}", "guidance=reward", "kernel.num_steps=3"]
    words += ["policy.targets=[conv1]"] if policy == "low_rank" else []
    config = compose("train", words)
    digits = build_process(config)
    made = build_policy(config, digits)
    assert "guidance" in made.parameter_groups()
    path = rollout(LatentEnv(digits, num_envs=2), made, plan=PATHWISE)
    assert not path[keys.KL].any()
    path["next", "reward"].sum().backward()
    assert made.weights.weight.grad is not None
    assert made.weights.weight.grad.abs().sum() > 0


def test_a_reward_with_attention_is_differentiated_twice(made: Callable[[str], Path]) -> None:
    """Fused attention, which CLIP uses by default, has no second derivative."""
    config = config_of("reward", "clip_score", made)
    process = build_process(config)
    policy = guided(process, 0.1)
    path = rollout(LatentEnv(process, num_envs=2), policy, plan=PATHWISE)
    path["next", "reward"].sum().backward()
    assert policy.weights.weight.grad is not None
    assert torch.isfinite(policy.weights.weight.grad).all()
    assert policy.weights.weight.grad[: K - 1].abs().sum() > 0


def test_rewards_that_ignore_the_sample_add_nothing(process: DenoisingProcess) -> None:
    given = state(process, 1, hat="yes")

    def blind(clean: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros(len(clean))

    assert torch.equal(guided(process, 0.5, blind).loc(*given), given[3])


def test_a_gradient_that_is_not_finite_is_named(process: DenoisingProcess) -> None:
    def steep(clean: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        return (clean - clean).sqrt().flatten(1).sum(1)

    with pytest.raises(NonFiniteError, match="guidance=reward"):
        guided(process, 0.5, steep).loc(*state(process, 1, hat="yes"))


def test_a_reward_without_gradient_is_refused_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["env=digits", "reward=jpeg", "agent=ppo", "guidance=reward"]
    words += ["~evaluation.heldout.digit", "policy=side_network"]
    assert main(["train", *words, f"run.root={tmp_path}"]) == 2
    assert "guidance=null" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="guidance=null"):
        RewardGuidedPolicy(policy=PriorPolicy(make_process("mixture2d").kernel), value=None)


@pytest.mark.parametrize("words", [[], ["trainer.ema_decay=0.9"], ["agent=ppo"]])
def test_a_guided_run_resumes_to_the_bit_and_is_loaded_again(
    words: list[str], tmp_path: Path
) -> None:
    words = ["env=mixture2d", "guidance=reward", "kernel.num_steps=3", *words]
    whole, cut = (train(tmp_path, name, *words) for name in ("whole", "cut"))
    expected = contents(cut)
    interrupt(cut)
    assert main(["train", f"resume={cut}"]) == 0
    assert contents(cut) == expected == contents(whole)
    assert summary(cut)["reward_calls"] == summary(whole)["reward_calls"]
    label = next(iter(load_run(cut).env.process.controls))
    drawn = [load_run(run).sample({label: 1}, n=4) for run in (whole, cut)]
    assert torch.equal(*drawn)
