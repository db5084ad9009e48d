"""The three ways to begin again, against Gymnasium's own vector env and under TorchRL."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from ctrl_rl.envs.control import ControlVectorEnv
from ctrl_rl.errors import ConfigError
from ctrl_rl.runs.loaded import make_process

SHORT = ["kernel.num_steps=4"]
MODES = list(AutoresetMode)


def ours(task: str, n: int, mode: Any) -> Any:
    return gymnasium.make_vec(
        f"ctrl_rl/{task}-v0", num_envs=n, overrides=SHORT, autoreset_mode=mode
    )


def gymnasiums(task: str, n: int, mode: AutoresetMode) -> SyncVectorEnv:
    def make() -> Any:
        return gymnasium.make(f"ctrl_rl/{task}-v0", overrides=SHORT)

    return SyncVectorEnv([make] * n, autoreset_mode=mode)


def played(envs: Any, mode: AutoresetMode) -> list[Any]:
    """All that three episodes give."""
    draws = np.random.default_rng(0)
    results = [envs.reset(seed=7)]
    for _ in range(13):
        action = draws.uniform(-1, 1, envs.action_space.shape).astype(np.float32)
        results.append(envs.step(action))
        if mode == AutoresetMode.DISABLED and results[-1][2].all():
            mask = np.ones(envs.num_envs, bool)
            results.append(envs.reset(options={"reset_mask": mask}))
    return results


def compare(one: Any, other: Any, *, values: bool) -> None:
    """Same keys, types and shapes, and the same bits if asked."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert sorted(one) == sorted(other)
        for name in one:
            compare(one[name], other[name], values=values)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            compare(*pair, values=values)
    else:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if one.dtype == object:
            compare(list(one), list(other), values=values)
        elif values or one.dtype == bool:
            assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", ["Mixture2d", "GaussianMean"])
def test_one_episode_is_that_of_gymnasiums_vector_env_bit_for_bit(
    task: str, mode: AutoresetMode
) -> None:
    results = [played(make(task, 1, mode), mode) for make in (ours, gymnasiums)]
    compare(*results, values=True)


@pytest.mark.parametrize("mode", MODES)
def test_several_episodes_have_the_form_of_gymnasiums_vector_env(mode: AutoresetMode) -> None:
    results = [played(make("Mixture2d", 3, mode), mode) for make in (ours, gymnasiums)]
    compare(*results, values=False)


def test_end_in_the_same_step_is_kept_in_the_info() -> None:
    ends, same = ours("Mixture2d", 3, "Disabled"), ours("Mixture2d", 3, "SameStep")
    for envs in (ends, same):
        envs.reset(seed=1)
    for _ in range(4):
        last, rewards, _, _, info = ends.step(np.zeros((3, 2)))
        observation, reward, ended, _, kept = same.step(np.zeros((3, 2)))
    assert ended.all() and np.array_equal(reward, rewards)
    assert (observation["step"] == 0).all()
    for place in range(3):
        assert np.array_equal(kept["final_obs"][place]["x"], last["x"][place])
        assert kept["final_obs"][place]["step"] == 4
    assert np.array_equal(kept["final_info"]["sample"], info["sample"])
    assert kept["_final_obs"].all() and kept["_final_info"].all() and "sample" not in kept
    assert same.step(np.zeros((3, 2)))[0]["step"].tolist() == [1, 1, 1]


def test_each_env_says_its_own_mode() -> None:
    process = make_process("mixture2d", SHORT)
    by_mode = [ControlVectorEnv(process, num_envs=2, autoreset_mode=mode) for mode in MODES]
    by_name = [ControlVectorEnv(process, num_envs=2, autoreset_mode=mode.value) for mode in MODES]
    for envs in (by_mode, by_name):
        assert [each.metadata["autoreset_mode"] for each in envs] == MODES
        assert [each.autoreset_mode for each in envs] == MODES
    assert ControlVectorEnv(process, num_envs=2).autoreset_mode == AutoresetMode.NEXT_STEP
    with pytest.raises(ConfigError, match="unknown autoreset_mode 'Samestep'; did you mean 'Same"):
        ControlVectorEnv(process, num_envs=2, autoreset_mode="Samestep")


@pytest.mark.filterwarnings("ignore:Creating .* WeightUpdaterBase:DeprecationWarning")
def test_torchrl_wraps_and_collects() -> None:
    from torchrl.collectors import Collector  # warns of its own classes

    env = GymWrapper(ours("Mixture2d", 3, AutoresetMode.DISABLED), categorical_action_encoding=True)
    check_env_specs(env)
    collector = Collector(env, frames_per_batch=24, total_frames=48)
    batches = list(collector)
    collector.shutdown()
    assert len(batches) == 2
    for batch in batches:
        assert batch.batch_size == (3, 8)
        assert batch["step"].tolist() == [[0, 1, 2, 3] * 2] * 3
        assert batch["next", "step"].tolist() == [[1, 2, 3, 4] * 2] * 3
        assert batch["next", "terminated"][..., 0].tolist() == [([False] * 3 + [True]) * 2] * 3
        # Away from the end, the reward is minus the KL of the drift, which is 3 times the action.
        kl = (3 * batch["action"]).square().sum(-1) / 2
        inside = ~batch["next", "terminated"][..., 0]
        torch.testing.assert_close(batch["next", "reward"][..., 0][inside], -kl[inside])
        assert not torch.equal(batch["x"][:, 0], batch["x"][:, 4])


def test_torchrl_seeds() -> None:
    env = GymWrapper(ours("Mixture2d", 3, "Disabled"))
    starts = []
    for seed in (0, 1, 0):
        env.set_seed(seed)
        starts.append(env.reset()["x"])
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
