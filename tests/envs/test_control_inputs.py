"""What the Gymnasium envs are given: actions, seeds, options, and calls in another order."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from ctrl_rl.errors import ConfigError

SHORT = ["kernel.num_steps=4"]


def one(name: str = "Mixture2d", **settings: Any) -> Any:
    return gymnasium.make(f"ctrl_rl/{name}-v0", **{"overrides": SHORT, **settings}).unwrapped


def many(n: int = 3, name: str = "Mixture2d", **settings: Any) -> Any:
    return gymnasium.make_vec(f"ctrl_rl/{name}-v0", n, **{"overrides": SHORT, **settings})


def test_action_of_another_shape_pays_nothing_because_it_is_refused() -> None:
    env, envs = one("Digits"), many(2, "Digits")
    env.reset(seed=0)
    assert env.step(np.full((1, 8, 8), 0.5))[1] == -8.0  # 64 * 0.5^2 / 2
    for shape in ((1,), (8, 8), (2, 1, 8, 8), ()):
        with pytest.raises(ConfigError, match=r"the action has shape .*; give \(1, 8, 8\)"):
            env.step(np.full(shape, 0.5))
    envs.reset(seed=0)
    for shape in ((1, 8, 8), (2, 1), (1, 1, 8, 8), (2,)):
        with pytest.raises(ConfigError, match=r"give \(2, 1, 8, 8\)"):
            envs.step(np.full(shape, 0.5))
    assert envs.step(np.full((2, 1, 8, 8), 0.5))[1].tolist() == [-8.0, -8.0]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ([[0.1], [0.2, 0.3]], "the action is no NumPy array: .*inhomogeneous"),
        (np.array([0.1j, 0.2]), "type complex128; give float32"),
        (np.array(["0", "1"]), "type <U1"),
        (np.array([None, None]), "type object"),
        (torch.zeros(2, requires_grad=True), "the action is no NumPy array: .*requires grad"),
    ],
)
def test_action_of_another_type_is_refused(action: Any, words: str) -> None:
    env = one()
    env.reset()
    with pytest.raises(ConfigError, match=words) as caught:
        env.step(action)
    assert "\n" not in str(caught.value)


def test_real_numbers_of_any_type_are_one_action() -> None:
    ends = []
    for action in (np.ones(2, np.float32), np.ones(2), [1, 1], torch.ones(2), np.ones(2, bool)):
        env = one()
        env.reset(seed=0)
        observation, reward, *_ = env.step(action)
        ends.append([*observation["x"], reward])
    assert all(end == ends[0] for end in ends)


def test_action_out_of_the_box_acts_and_pays_as_it_is() -> None:
    results = []
    for scale, action in ((1.0, [2.5, -3.0]), (10.0, [0.25, -0.3])):
        envs = many(2, overrides=[*SHORT, f"env.control_scale={scale}"])
        envs.reset(seed=0)
        observation, reward, _, _, info = envs.step(np.tile(action, (2, 1)))
        assert info["kl"] == pytest.approx([(2.5**2 + 3.0**2) / 2] * 2)
        assert reward == pytest.approx(-info["kl"])
        results.append(observation["x"])
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30, 1e300])
def test_action_without_a_finite_kl_is_refused_and_changes_nothing(number: float) -> None:
    envs, untouched = many(), many()
    wrong = np.zeros((3, 2))
    wrong[1, 1] = number
    for each in (envs, untouched):
        each.reset(seed=0)
    with pytest.raises(ConfigError, match=r"episode 1 reaches (nan|inf|1e\+30); .* finite"):
        envs.step(wrong)
    after = [each.step(np.zeros((3, 2)))[0] for each in (envs, untouched)]
    assert np.array_equal(after[0]["x"], after[1]["x"])
    assert after[0]["step"].tolist() == [1, 1, 1]


def test_calls_out_of_order_say_what_to_do() -> None:
    for env, action in ((one(), np.zeros(2)), (many(autoreset_mode="Disabled"), np.zeros((3, 2)))):
        with pytest.raises(ConfigError, match=r"no episode has begun; call reset\(\)"):
            env.step(action)
        env.reset()
        for _ in range(4):
            env.step(action)
        with pytest.raises(ConfigError, match=r"the episode ended at step 4; call reset\(\)"):
            env.step(action)
        env.reset()
        assert env.step(action)[2] is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contrl": {"group": 1}}, "unknown reset option 'contrl'; did you mean 'control'"),
        ({"control": 3}, "options\\['control'\\] is of type int; give values by name"),
        ({"control": {"grop": 3}}, "did you mean 'group'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    for env in (one(), many()):
        with pytest.raises(ConfigError, match=words):
            env.reset(options=options)
    with pytest.raises(ConfigError, match="unknown reset option 'reset_mask'"):
        one().reset(options={"reset_mask": np.ones(1, bool)})


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.array([True, False, True]), r"leaves out episode\(s\) 1; .* reset all of them"),
        (np.zeros(3, bool), r"leaves out episode\(s\) 0, 1, 2"),
        (np.ones(2, bool), "NumPy array of 3 booleans"),
        (np.ones(3, int), "NumPy array of 3 booleans"),
        ([True] * 3, "NumPy array of 3 booleans"),
    ],
)
def test_mask_is_of_all_episodes(mask: Any, words: str) -> None:
    envs = many()
    with pytest.raises(ConfigError, match=words):
        envs.reset(options={"reset_mask": mask})
    options = {"reset_mask": np.ones(3, bool), "control": {"group": 2}}
    observation, _ = envs.reset(options=options)
    assert observation["control_group"].tolist() == [2, 2, 2] and len(options) == 2


def starts(envs: Any, seed: Any) -> list[float]:
    values: list[float] = envs.reset(seed=seed)[0]["x"].flatten().tolist()
    return values


def test_list_of_seeds_is_as_good_as_one() -> None:
    envs = many()
    lists = ([1, 2, 3], [1, 2, 4], [3, 2, 1], [0, 0, 0], [2**32, 5, 0], [0, 1, 5])
    first = [starts(envs, seeds) for seeds in lists]
    assert len({tuple(each) for each in first}) == len(lists)
    assert [starts(many(), seeds) for seeds in lists] == first
    assert starts(envs, tuple(lists[0])) == starts(envs, np.array(lists[0])) == first[0]
    starts(envs, 7)
    goes_on = starts(envs, [None] * 3)
    starts(envs, 7)
    assert starts(envs, None) == goes_on


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([1, 2], "2 seeds for 3 episodes; give one for each"),
        ([1, None, 3], "seed None in a list: .* a whole number of 0 or more for each"),
        ([1, -2, 3], "seed -2 in a list"),
        ([1, 2.5, 3], "seed 2.5 in a list"),
    ],
)
def test_wrong_lists_of_seeds_are_refused(seeds: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        many().reset(seed=seeds)
