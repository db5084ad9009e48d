"""The Gymnasium envs: contract, law, reward identity, one network call per step."""

import re
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import choices
from contract_tasks import Made, words_of_task
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from numpy.typing import NDArray
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.envs.control import ControlEnv, ControlVectorEnv
from ctrl_rl.envs.registration import TASKS
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.runs.loaded import make_env

SHORT = ["kernel.num_steps=4"]


class ConstantDrift(DenoisingPolicy):
    """loc = prior_loc + scale u, in the latent env what u is in the control env."""

    def __init__(self, kernel: TransitionKernel, drift: Tensor) -> None:
        super().__init__(kernel)
        self.drift = drift

    def mean(self, x: Tensor, step: Tensor, control: Any, prior_loc: Tensor) -> Tensor:
        return prior_loc + gaussian.expand_to(self.kernel.scale[step], x) * self.drift


def make_vec(name: str, num_envs: int, overrides: list[str] = SHORT) -> Any:
    return gymnasium.make_vec(f"ctrl_rl/{name}-v0", num_envs=num_envs, overrides=overrides)


def play(envs: Any, action: NDArray[np.float32], seed: int) -> tuple[NDArray[Any], dict[str, Any]]:
    """Sum of rewards of one episode each, and the last info."""
    envs.reset(seed=seed)
    total: NDArray[Any] = np.zeros(envs.num_envs)
    actions = np.broadcast_to(action, envs.action_space.shape).astype(np.float32)
    while True:
        _, reward, ended, _, info = envs.step(actions)
        total += reward
        if ended.all():
            return total, info


@pytest.mark.parametrize("env_id", sorted(TASKS))
def test_id_passes_gymnasiums_checker_without_a_warning(env_id: str, made: Made) -> None:
    words = [*SHORT, *words_of_task(TASKS[env_id], made)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(env_id, overrides=words, render_mode="rgb_array")
        check_env(env.unwrapped)  # also renders
        assert env.observation_space.contains(env.observation_space.sample())


def test_every_task_has_an_id() -> None:
    assert sorted(TASKS.values()) == choices("env")
    assert set(TASKS) <= set(gymnasium.registry)


@pytest.mark.parametrize("env_id", sorted(TASKS))
def test_vector_env_makes_one_batched_call_per_step(env_id: str, made: Made) -> None:
    words = [*SHORT, *words_of_task(TASKS[env_id], made)]
    envs = gymnasium.make_vec(env_id, num_envs=64, overrides=words)
    assert isinstance(envs.unwrapped, ControlVectorEnv) and envs.num_envs == 64
    sizes: list[int] = []
    denoiser = envs.unwrapped.process.prior.denoiser
    denoiser.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    calls = 4 + envs.unwrapped.process.kernel.has_read_out
    envs.action_space.seed(0)
    observation, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(observation)
    for k in range(4):
        observation, reward, ended, cut, _ = envs.step(envs.action_space.sample())
        assert sizes == [64] * min(k + 2, calls)
        assert envs.observation_space.contains(observation)
        assert reward.shape == ended.shape == cut.shape == (64,)
        assert ended.all() == (k == 3) and not cut.any()


def test_autoreset_follows_the_next_step_mode() -> None:
    envs = make_vec("Mixture2d", 3)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    play(envs, np.zeros(2, np.float32), seed=1)
    ignored = np.full(envs.action_space.shape, np.nan, np.float32)
    observation, reward, ended, cut, info = envs.step(ignored)
    assert (observation["step"] == 0).all() and (reward == 0).all()
    assert not ended.any() and not cut.any() and info == {}
    observation, reward, ended, _, _ = envs.step(np.zeros_like(ignored))
    assert (observation["step"] == 1).all() and np.isfinite(observation["x"]).all()
    assert not ended.any()


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_rewards_sum_to_evidence_minus_squared_drift(strength: float) -> None:
    overrides = [*SHORT, f"env.guidance_strength={strength}", "env.control_scale=2.0"]
    env = gymnasium.make("ctrl_rl/Mixture2d-v0", overrides=overrides).unwrapped
    assert isinstance(env, ControlEnv)
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    rewards, squares, info = 0.0, 0.0, {}
    ended = False
    while not ended:
        action = env.action_space.sample()
        observation, reward, ended, _, info = env.step(action)
        rewards += reward
        squares += float(np.square(2.0 * action).sum())
        assert info["kl"] == pytest.approx(np.square(2.0 * action).sum() / 2, rel=1e-5)
    label = torch.as_tensor(observation["control_group"])[None]
    evidence = env.process.reward_model(torch.as_tensor(info["sample"])[None], {"group": label})
    assert rewards == pytest.approx(strength * float(evidence) - squares / 2, rel=1e-5)


def test_without_drift_the_env_is_the_prior_bit_for_bit() -> None:
    envs = make_vec("Mixture2d", 32)
    _, info = play(envs, np.zeros(2, np.float32), seed=5)
    # The env's generator is seeded from Gymnasium's own; given the same seed, the same chain.
    latent = make_env("mixture2d", num_envs=32, overrides=SHORT)
    latent.generator.manual_seed(int(seeding.np_random(5)[0].integers(2**63)))
    episode = rollout(latent, PriorPolicy(latent.process.kernel))
    assert np.array_equal(info["sample"], episode[keys.SAMPLE][:, -1].numpy())


@pytest.mark.parametrize("task", ["Gaussian", "Mixture2d"])
def test_constant_drift_earns_the_same_soft_return_in_both_envs(task: str) -> None:
    n, drift = 4096, torch.tensor([0.5, -0.3])
    envs = make_vec(task, n)
    scale = {"Gaussian": 1.0, "Mixture2d": 3.0}[task]
    returns, _ = play(envs, (drift / scale).numpy(), seed=0)
    latent = make_env(task.lower(), num_envs=n, seed=1, overrides=SHORT)
    with torch.no_grad():
        episode = rollout(latent, ConstantDrift(latent.process.kernel, drift))
    kl = episode[keys.KL].sum(1)
    torch.testing.assert_close(kl, torch.full((n,), 4 * float(drift.square().sum()) / 2))
    theirs = (episode[keys.NEXT_REWARD].sum((1, 2)) - kl).double().numpy()
    error = np.sqrt(returns.var() / n + theirs.var() / n)
    assert abs(returns.mean() - theirs.mean()) < 4 * error
    assert 0.8 < returns.std() / theirs.std() < 1.25


def test_seed_decides_every_bit() -> None:
    envs = make_vec("Gaussian", 4)
    action = np.full(2, 0.3, np.float32)
    first, info = play(envs, action, seed=7)
    again, same = play(envs, action, seed=7)
    other, _ = play(envs, action, seed=8)
    assert np.array_equal(first, again) and np.array_equal(info["sample"], same["sample"])
    assert not np.array_equal(first, other)


def test_control_can_be_chosen() -> None:
    env = gymnasium.make("ctrl_rl/Mixture2d-v0", overrides=SHORT)
    for label in range(5):
        observation, _ = env.reset(options={"control": {"group": label}})
        assert observation["control_group"] == label
    with pytest.raises(ConfigError, match="use whole labels 0 to 3"):
        env.reset(options={"control": {"group": 7}})
    envs = make_vec("Mixture2d", 3)
    observation, _ = envs.reset(options={"control": {"group": np.array([0, 3, 1])}})
    assert observation["control_group"].tolist() == [0, 3, 1]
    observation, _ = envs.reset(options={"control": {"group": np.array(["0", "3", "any"])}})
    assert observation["control_group"].tolist() == [0, 3, 4]


def test_edited_observations_and_infos_change_nothing() -> None:
    returns = []
    for edit in (False, True):
        envs = make_vec("Mixture2d", 4)
        observation, _ = envs.reset(seed=0)
        total: NDArray[Any] = np.zeros(4)
        for _ in range(4):
            if edit:
                for value in observation.values():
                    value[...] = 0
            observation, reward, _, _, _ = envs.step(np.zeros((4, 2), np.float32))
            total += reward
        returns.append(total)
    assert np.array_equal(*returns)


def test_gymnasiums_vector_wrappers_fit() -> None:
    recorded = RecordEpisodeStatistics(make_vec("Mixture2d", 3))
    total, info = play(recorded, np.full(2, 0.1, np.float32), seed=0)
    np.testing.assert_allclose(info["episode"]["r"], total, rtol=1e-5)
    assert (info["episode"]["l"] == 4).all()

    listed = DictInfoToList(make_vec("Mixture2d", 3))
    _, infos = play(listed, np.zeros(2, np.float32), seed=0)
    assert [sorted(info) for info in infos] == [["kl", "sample"]] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"num_envs": 0},
        {"num_envs": 2, "control_scale": 0.0},
        {"num_envs": 2, "control_scale": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    process = make_env("mixture2d", overrides=SHORT).process
    with pytest.raises(ConfigError, match="must be"):
        ControlVectorEnv(process, **settings)


def test_docstring_follows_gymnasiums_template() -> None:
    assert re.findall(r"^\s*## (.+)$", ControlEnv.__doc__ or "", re.MULTILINE) == [
        "Description",
        "Action Space",
        "Observation Space",
        "Rewards",
        "Starting State",
        "Episode End",
        "Arguments",
        "Vectorized environment",
        "Version History",
    ]
