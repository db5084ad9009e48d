"""The TorchRL env: specs, seeds, gradients, resets."""

import pytest
import torch
from conftest import choices
from contract_tasks import Made, words_of_task
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import check_env_specs

from ctrl_rl import keys
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import check_invariants, rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.policies import DenoisingPolicy, DriftPolicy, PriorPolicy
from ctrl_rl.rewards import FunctionReward
from ctrl_rl.runs.loaded import make_env, make_process

SHORT = ["kernel.num_steps=4"]


@pytest.mark.parametrize("task", choices("env"))
def test_task_keeps_torchrls_contract(task: str, made: Made) -> None:
    words = [*SHORT, *words_of_task(task, made)]
    check_env_specs(make_env(task, num_envs=3, overrides=words))


@pytest.mark.parametrize("task", choices("env"))
def test_seed_decides_every_bit(task: str, made: Made) -> None:
    words = [*SHORT, *words_of_task(task, made)]

    def run(seed: int) -> torch.Tensor:
        env = make_env(task, num_envs=5, seed=seed, overrides=words)
        episode = rollout(env, PriorPolicy(env.process.kernel))
        flat: torch.Tensor = torch.cat(
            [episode[key].flatten(1) for key in (keys.X, keys.NEXT_REWARD, keys.SAMPLE)], 1
        )
        return flat

    first = run(3)
    torch.rand(7)  # the global generator has no say
    assert torch.equal(first, run(3))
    assert not torch.equal(first, run(4))


def test_set_seed_restarts_the_stream() -> None:
    env = make_env("mixture2d", num_envs=5, seed=1, overrides=SHORT)
    first = env.reset()["x"]
    assert not torch.equal(env.reset()["x"], first)
    env.set_seed(1)
    assert torch.equal(env.reset()["x"], first)


class DrawsFromTheEnv(TensorDictModuleBase):
    """A policy whose noise comes from the env's generator, as `rollout` has it."""

    def __init__(self, policy: DenoisingPolicy, generator: torch.Generator) -> None:
        super().__init__()
        self.policy, self.generator = policy, generator
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys

    def forward(self, state: TensorDictBase) -> TensorDictBase:
        return self.policy(state, generator=self.generator)


def test_own_rollout_is_the_stock_rollout_bit_for_bit() -> None:
    env = make_env("mixture2d", num_envs=6, seed=2, overrides=SHORT)
    policy = PriorPolicy(env.process.kernel)
    own = rollout(env, policy)
    env.set_seed(2)
    stock = env.rollout(4, DrawsFromTheEnv(policy, env.generator))
    for key in (keys.X, keys.STEP, keys.ACTION, keys.PRIOR_LOC, keys.NEXT_REWARD, keys.NEXT_DONE):
        assert torch.equal(own[key], stock[key]), key
    assert torch.equal(own[keys.SAMPLE][:, -1], stock["next", "sample"][:, -1])
    assert (stock["next", "sample"][:, :-1] == 0).all()


def test_stock_rollout_over_two_episodes_draws_anew() -> None:
    env = make_env("mixture2d", num_envs=64, overrides=SHORT)
    episodes = env.rollout(8, PriorPolicy(env.process.kernel), break_when_any_done=False)
    assert episodes["step"][0].tolist() == [0, 1, 2, 3] * 2
    assert episodes[keys.NEXT_DONE][0, :, 0].tolist() == [False, False, False, True] * 2
    for key in ("x", ("control", "group")):
        assert not torch.equal(episodes[key][:, 0], episodes[key][:, 4])


def test_reward_has_the_closed_form_gradient_to_the_last_action() -> None:
    env = make_env("gaussian", num_envs=6, overrides=SHORT)
    kernel, prior = env.process.kernel, env.process.prior
    state = env.reset()
    for _ in range(3):
        state = env.step(state.set("action", state["prior_loc"]))["next"]
    action = torch.randn(6, 2).requires_grad_()
    after = env.step(state.set("action", action))["next"]
    (gradient,) = torch.autograd.grad(after["reward"].sum(), action)
    # The read-out is affine: slope times identity, so the gradient is slope * weights[label].
    points, t = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), kernel.timesteps[-1].expand(2)
    ends = kernel.mean(points, prior.denoiser(points, t), torch.tensor([4, 4]))
    weights = env.process.reward_model.get_buffer("weights")[state["control", "direction"]]
    torch.testing.assert_close(gradient, (ends[1, 0] - ends[0, 0]) * weights)


def test_rewards_come_at_the_end_and_scale_with_the_guidance() -> None:
    one = make_env("mixture2d", num_envs=8, overrides=SHORT)
    two = make_env("mixture2d", num_envs=8, overrides=[*SHORT, "env.guidance_strength=2.5"])
    first, second = (rollout(env, PriorPolicy(env.process.kernel)) for env in (one, two))
    assert (first[keys.NEXT_REWARD][:, :-1] == 0).all()
    last = first[keys.NEXT_REWARD][:, -1, 0]
    control = {"group": first[keys.CONTROL, "group"][:, -1]}
    torch.testing.assert_close(
        last, one.process.reward_model(first[keys.SAMPLE][:, -1], control), rtol=0, atol=0
    )
    torch.testing.assert_close(second[keys.NEXT_REWARD][:, -1, 0], 2.5 * last)


def test_prior_is_called_once_per_state() -> None:
    env = make_env("mixture2d", num_envs=8, overrides=SHORT)
    sizes: list[int] = []
    env.process.prior.denoiser.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    rollout(env, PriorPolicy(env.process.kernel))
    assert sizes == [8] * 5  # four steps and the read-out
    assert env.process.prior_calls == sum(sizes)
    assert env.process.reward_calls == 8


def test_prior_samples_have_the_chains_marginal() -> None:
    env = make_env("gaussian", num_envs=20_000, overrides=SHORT)
    kernel, prior = env.process.kernel, env.process.prior
    sample = rollout(env, PriorPolicy(kernel))[keys.SAMPLE][:, -1]
    mean, variance = torch.zeros(2), 1.0
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for k, t in enumerate(kernel.timesteps):
        ends = kernel.mean(points, prior.denoiser(points, t.expand(2)), torch.tensor([k, k]))
        slope = float(ends[1, 0] - ends[0, 0])
        mean, variance = ends[0] + slope * mean, slope**2 * variance + float(kernel.scale[k]) ** 2
    n = len(sample)
    assert ((sample.mean(0) - mean).abs() < 4 * (variance / n) ** 0.5).all()
    assert ((sample.var(0) / variance - 1).abs() < 4 * (2 / n) ** 0.5).all()


def test_controls_are_given_by_label_or_batch_and_null_where_missing() -> None:
    env = make_env("mixture2d", num_envs=4, overrides=SHORT)
    policy = PriorPolicy(env.process.kernel)
    for given, expected in (
        ({"group": 2}, [2, 2, 2, 2]),
        ({"group": torch.tensor([3, 0, 1, 4])}, [3, 0, 1, 4]),
        ({}, [4, 4, 4, 4]),
        ({"group": "2"}, [2, 2, 2, 2]),
        ({"group": "any"}, [4, 4, 4, 4]),
        ({"group": ["3", 0, "any", "4"]}, [3, 0, 4, 4]),
    ):
        episode = rollout(env, policy, control=given)
        assert episode[keys.CONTROL, "group"][:, 0].tolist() == expected
    reward = rollout(env, policy, control={})[keys.NEXT_REWARD]
    assert (reward == 0).all()  # the null label asks for nothing


@pytest.mark.parametrize(
    ("control", "fix"),
    [
        ({"group": 5}, "use whole labels 0 to 3, or 4 for the null label"),
        ({"group": -1}, "use whole labels 0 to 3"),
        ({"group": 1.5}, "use whole labels 0 to 3"),
        ({"grop": 1}, "did you mean 'group'"),
        ({"group": [0, 1, 2]}, "give one label, or 4 labels"),
        ({"group": "7"}, "use whole labels 0 to 3"),
        ({"group": "1.5"}, "unknown label '1.5' of control group; .*accepted: 0, 1, 2, 3, any"),
        ({"group": [0, 1, "ani", 2]}, "did you mean 'any'"),
    ],
)
def test_wrong_controls_are_refused_with_the_fix(control: dict[str, object], fix: str) -> None:
    env = make_env("mixture2d", num_envs=4, overrides=SHORT)
    with pytest.raises(ConfigError, match=fix):
        rollout(env, PriorPolicy(env.process.kernel), control=control)  # type: ignore[arg-type]


def test_settings_out_of_range_are_refused() -> None:
    process = make_process("mixture2d", SHORT)
    with pytest.raises(ConfigError, match="num_envs=0"):
        LatentEnv(process, num_envs=0)
    fixes = {"0": "use 1 for the Bayes", "-1": "use 1 for the Bayes"}
    fixes |= {"nan": "must be a number, finite", "inf": "must be a number, finite"}
    for strength, fix in fixes.items():
        with pytest.raises(ConfigError, match=f"env.guidance_strength.*{fix}"):
            make_process("mixture2d", [*SHORT, f"env.guidance_strength={strength}"])


def test_reward_may_do_without_a_control() -> None:
    with_label = make_process("mixture2d", SHORT)
    reward = FunctionReward(
        function=lambda sample, control: sample.sum(1), controls={}, differentiable=True
    )
    prior, kernel = with_label.prior, with_label.kernel
    process = DenoisingProcess(prior=prior, kernel=kernel, reward=reward)
    env = LatentEnv(process, num_envs=3)
    check_env_specs(env)
    policy = DriftPolicy(prior=prior, kernel=kernel, controls=process.controls)
    plan = RolloutPlan(gradients="pathwise")
    episode = rollout(env, policy, plan=plan)
    check_invariants(episode, plan)
    torch.testing.assert_close(
        episode[keys.NEXT_REWARD][:, -1, 0], episode[keys.SAMPLE][:, -1].sum(1)
    )


def test_partial_reset_is_refused() -> None:
    env = make_env("mixture2d", num_envs=2, overrides=SHORT)
    state = env.reset()
    state["_reset"] = torch.tensor([[True], [False]])
    with pytest.raises(ConfigError, match="in step"):
        env.reset(state)
