"""stable-baselines3 on the control env: what its algorithms rely on, and that they run."""

import importlib
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import ctrl_rl
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import EvaluationPlan

sb3 = pytest.importorskip("stable_baselines3")

from ctrl_rl.integrations.sb3 import ControlVecEnv, actions_of  # noqa: E402

SHORT = ["kernel.num_steps=4"]
FEW = EvaluationPlan(prior_samples=64, policy_samples=8, exact_samples=0, most_conditions=4)


def make(task: str = "Mixture2d", n: int = 3, **settings: Any) -> Any:
    given = {"num_envs": n, "overrides": SHORT, **settings}
    return gymnasium.make_vec(f"ctrl_rl.envs:ctrl_rl/{task}-v0", **given)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_every_step_is_the_control_envs_and_ends_begin_anew_at_once(mode: str) -> None:
    envs, plain = ControlVecEnv(make(autoreset_mode=mode)), make()
    envs.seed(5)
    observation = envs.reset()
    expected, _ = plain.reset(seed=[5, 6, 7])
    actions = np.random.default_rng(0).uniform(-1, 1, (9, 3, 2)).astype(np.float32)
    for k, action in enumerate(actions):
        for name, array in expected.items():
            np.testing.assert_array_equal(observation[name], array)
        assert envs.observation_space.contains({k: v[0] for k, v in observation.items()})
        observation, reward, ended, infos = envs.step(action)
        expected, paid, ends, _, info = plain.step(action)
        np.testing.assert_array_equal(reward, paid.astype(np.float32))
        assert reward.dtype == np.float32 and ended.tolist() == ends.tolist()
        assert ended.all() == (k % 4 == 3) and [each["kl"] for each in infos] == [*info["kl"]]
        if ended.all():
            assert (observation["step"] == 0).all()
            for place, each in enumerate(infos):
                last = each["terminal_observation"]
                assert last["step"] == 4 and not each["TimeLimit.truncated"]
                np.testing.assert_array_equal(last["x"], expected["x"][place])
                np.testing.assert_array_equal(each["sample"], info["sample"][place])
            expected, *_ = plain.step(action)  # the step that Gymnasium's mode leaves to resets


def test_options_fix_the_condition_of_the_next_reset() -> None:
    envs = ControlVecEnv(make())
    envs.set_options({"control": {"group": 2}})
    assert envs.reset()["control_group"].tolist() == [2, 2, 2]
    assert len({*envs.reset()["control_group"].tolist()}) > 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="SameStep; give 'Disabled' or 'NextStep'"):
        ControlVecEnv(make(autoreset_mode="SameStep"))
    with pytest.raises(ConfigError, match="envs is a str; give a vector env"):
        ControlVecEnv("mixture2d")  # type: ignore[arg-type]
    envs = ControlVecEnv(make())
    with pytest.raises(ConfigError, match="the episodes share one env"):
        envs.set_attr("control_scale", 2.0)
    with pytest.raises(ConfigError, match="the episodes share one env"):
        envs.env_method("reset")
    assert envs.get_attr("control_scale") == [3.0] * 3 and envs.env_is_wrapped(object, 0) == [False]


@pytest.mark.parametrize("task", ["Mixture2d", "GaussianMean", "Digits"])
def test_ppo_runs_on_labels_numbers_and_images_and_is_measured(task: str) -> None:
    envs = make(task, 4)
    model = sb3.PPO("MultiInputPolicy", ControlVecEnv(envs), n_steps=4, batch_size=16, device="cpu")
    model.learn(32)
    found = ctrl_rl.evaluate_policy(envs, actions_of(model), plan=FEW).summary
    again = ctrl_rl.evaluate_policy(envs, actions_of(model), plan=FEW).summary
    assert found == again and found["kl_nats"] > 0
    torch.manual_seed(0)
    noisy = ctrl_rl.evaluate_policy(envs, actions_of(model, deterministic=False), plan=FEW).summary
    assert noisy["kl_nats"] > found["kl_nats"]


def test_agents_with_a_replay_buffer_run() -> None:
    model = sb3.SAC("MultiInputPolicy", ControlVecEnv(make()), learning_starts=12, device="cpu")
    model.learn(24)
    ends = model.replay_buffer.dones[:8].reshape(-1)
    steps = model.replay_buffer.next_observations["step"][:8].reshape(-1)
    assert (steps[ends > 0] == 4).all() and (ends > 0).sum() == 6


def test_without_the_package_one_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.vec_env", None)
    monkeypatch.delitem(sys.modules, "ctrl_rl.integrations.sb3")
    with pytest.raises(ConfigError, match=r"pip install 'ctrl-rl\[sb3\]'$"):
        importlib.import_module("ctrl_rl.integrations.sb3")
