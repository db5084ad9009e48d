"""Policies from elsewhere: their figures are those of the same policy inside, or in closed form."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from agent_tasks import StepShifts, make, noisy_drift, oracles
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from numpy.typing import NDArray

import ctrl_rl
from ctrl_rl import keys
from ctrl_rl.envs.control import ControlVectorEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.evaluation.foreign import ForeignSampler
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.runs.loaded import make_process

SHORT = ["kernel.num_steps=6"]
PLAN = EvaluationPlan(prior_samples=2048, policy_samples=512, exact_samples=256)
MANY = EvaluationPlan(prior_samples=2048, policy_samples=16384, exact_samples=0, batch_size=4096)
COMPARED = ["soft_return", "log_z_prior", "log_z_policy", "gap_nats", "gap_nats_certified"]
COMPARED += ["eubo_gap_nats", "ess", "kl_nats", "reward"]


def nothing(observation: dict[str, Any]) -> NDArray[Any]:
    return np.zeros_like(observation["x"])


def test_a_function_has_the_figures_of_the_same_policy_inside() -> None:
    env = make("mixture2d", num_envs=4)
    policy: Any = noisy_drift(env, "mixture2d")

    def act(observation: dict[str, Any]) -> NDArray[Any]:
        x, step, group = (torch.as_tensor(observation[k]) for k in ("x", "step", "control_group"))
        assert (step == step[0]).all()  # in step, for the densities of given paths as well
        drift: NDArray[Any] = policy.drift(x, step, {"group": group}).numpy()
        return drift / 3.0  # the task's control_scale

    inside = evaluate(PolicySampler(env.process, policy), PLAN).summary
    outside = ctrl_rl.evaluate_policy("mixture2d", act, overrides=SHORT, plan=PLAN).summary
    assert inside["eubo_gap_nats"] is not None and inside["kl_nats"] > 0.1
    for name, row in inside["per_label"].items():
        for figure in COMPARED:
            found = outside["per_label"][name][figure]
            assert found == pytest.approx(row[figure], rel=1e-3, abs=1e-3), (name, figure)
    assert outside["contradictions"] == inside["contradictions"]


def test_what_it_is_given_is_what_the_vector_env_gives() -> None:
    for task in ("mixture2d", "gaussian_mean", "digits"):
        seen: list[dict[str, Any]] = []

        def act(observation: dict[str, Any], seen: list[dict[str, Any]] = seen) -> NDArray[Any]:
            seen.append(observation)
            return nothing(observation)

        process = make_process(task, ["kernel.num_steps=2"])
        sampler = ForeignSampler(process, act, control_scale=1.0)
        value = {name: control.some_value for name, control in process.controls.items()}
        sampler.draw(value, n=3, batch_size=2, seed=0)
        for observation in seen:
            envs = ControlVectorEnv(process, num_envs=len(observation["x"]))
            given, _ = envs.reset(options={"control": value})
            assert observation.keys() == given.keys() and envs.observation_space.contains(given)
            for key, array in given.items():
                assert (observation[key].shape, observation[key].dtype) == (
                    array.shape,
                    array.dtype,
                )
        assert [len(each["x"]) for each in seen] == [3, 2, 2, 1, 1]  # the first is a trial
        assert [each["step"][0] for each in seen] == [0, 0, 1, 0, 1]


def test_the_optimum_from_elsewhere_falls_short_by_the_start_law_alone() -> None:
    process = make_process("gaussian", SHORT)
    table = np.stack([each.optimal_shifts / each.sigmas[:, None] for each in oracles(process)])

    def act(observation: dict[str, Any]) -> NDArray[Any]:
        (label,) = (value for key, value in observation.items() if key.startswith("control"))
        return table[label, observation["step"]]

    rows = ctrl_rl.evaluate_policy("gaussian", act, overrides=SHORT, plan=MANY).summary["per_label"]
    for oracle, shifts, row in zip(oracles(process), table, rows.values(), strict=True):
        assert row["kl_nats"] == pytest.approx((shifts**2).sum() / 2, rel=1e-4)
        assert row["soft_return"] == pytest.approx(oracle.optimal_soft_return, abs=0.02)
        assert row["gap_nats"] == pytest.approx(oracle.start_law_term, abs=0.02)


class Random:
    """Half of the optimal drift, and noise of its own, which the linear reward does not mind."""

    def __init__(self, process: Any, std: float) -> None:
        self.std, self.generator = std, np.random.default_rng(0)
        self.optimal = np.stack([o.optimal_shifts / o.sigmas[:, None] for o in oracles(process)])

    def __call__(self, observation: dict[str, Any]) -> NDArray[Any]:
        (label,) = (value for key, value in observation.items() if key.startswith("control"))
        noise = self.generator.standard_normal(observation["x"].shape)
        return 0.5 * self.optimal[label, observation["step"]] + self.std * noise


def test_the_noise_of_a_random_policy_pays_for_every_draw_and_log_z_stays_unbiased() -> None:
    process, std = make_process("gaussian", SHORT), 0.3
    act = Random(process, std)
    found = ctrl_rl.evaluate_policy("gaussian", act, overrides=SHORT, plan=MANY).summary
    noise = 6 * 2 * std**2 / 2  # steps, dimensions
    rows = found["per_label"].values()
    for oracle, optimal, row in zip(oracles(process), act.optimal, rows, strict=True):
        missed = (optimal**2).sum() / 8
        assert row["kl_nats"] == pytest.approx(missed + noise, rel=0.02)
        best = oracle.optimal_soft_return
        assert row["soft_return"] == pytest.approx(best - missed - noise, abs=0.03)
        assert row["log_z_policy"] == pytest.approx(oracle.log_z, abs=0.1)
        low, high = row["gap_nats_ci"]
        assert low - 0.02 < oracle.start_law_term + missed + noise < high + 0.02
    assert found["contradictions"] == []


def test_log_ratios_on_given_paths_are_those_of_the_extended_optimum() -> None:
    """E[sum u . z - |u|^2 / 2] over optimal paths, on which z has the mean of the optimal drift."""
    env = make("gaussian", num_envs=8192)
    act, calls = Random(env.process, 0.3), []

    def noted(observation: dict[str, Any]) -> NDArray[Any]:
        calls.append((len(observation["x"]), *set(observation["step"].tolist())))
        return act(observation)

    policy = StepShifts(env.process)
    for label, oracle in enumerate(oracles(env.process)):
        policy.shifts.data[label] = torch.as_tensor(oracle.optimal_shifts, dtype=torch.float32)
    (name,) = env.process.controls
    with torch.no_grad():
        episodes = rollout(env, policy, control={name: 1})
        sampler = ForeignSampler(env.process, noted, control_scale=1.0)
        calls.clear()
        found = sampler.log_ratio_on(episodes, {name: 1}, 3000)
        none = sampler.log_ratio_on(episodes[:0], {name: 1}, 3000)
    optimal = act.optimal[1]
    expected = (0.5 * optimal**2 - 0.25 * optimal**2 / 2).sum() - 6 * 2 * 0.3**2 / 2
    assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / 8192**0.5)
    assert none.shape == (0,)
    assert calls == [(size, k) for size in (3000, 3000, 2192) for k in range(6)]  # as episodes go


def test_a_policy_may_remember_its_episode() -> None:
    """Weights of a drift that depends on the past, and on old draws, are unbiased all the same."""
    process = make_process("gaussian", SHORT)
    generator, memory = np.random.default_rng(0), {}

    def act(observation: dict[str, Any]) -> NDArray[Any]:
        if observation["step"][0] == 0:
            memory["first"] = 0.15 * np.sign(observation["x"])
            memory["drawn"] = np.zeros_like(observation["x"])
        noise = generator.standard_normal(observation["x"].shape)
        memory["drawn"] = 0.8 * memory["drawn"] + 0.2 * noise
        return memory["first"] + memory["drawn"]

    found = ctrl_rl.evaluate_policy("gaussian", act, overrides=SHORT, plan=MANY).summary
    for oracle, row in zip(oracles(process), found["per_label"].values(), strict=True):
        assert row["log_z_policy"] == pytest.approx(oracle.log_z, abs=0.15)  # deviates by 0.04
    assert found["contradictions"] == []
    mixed = ctrl_rl.evaluate_policy("mixture2d", act, overrides=SHORT, plan=PLAN).summary
    assert mixed["eubo_gap_nats"] > mixed["gap_nats"]


def test_envs_stand_for_their_task() -> None:
    task = "ctrl_rl.envs:ctrl_rl/Mixture2d-v0"
    few = EvaluationPlan(prior_samples=64, policy_samples=8, exact_samples=0)
    words = ["kernel.num_steps=4", "env.control_scale=2.0"]
    made = [
        gymnasium.make(task, overrides=words),
        gymnasium.make_vec(task, num_envs=2, overrides=words),
        RecordEpisodeStatistics(gymnasium.make_vec(task, num_envs=2, overrides=words)),
    ]
    named = ctrl_rl.evaluate_policy(
        "mixture2d", lambda o: 0.5 + nothing(o), overrides=words, plan=few
    )
    assert named.summary["kl_nats"] == pytest.approx(4 * 2 * 1.0**2 / 2, rel=1e-4)
    for env in made:
        found = ctrl_rl.evaluate_policy(env, lambda o: 0.5 + nothing(o), plan=few)
        assert found.summary == named.summary
    with pytest.raises(ConfigError, match="overrides= changes a task that is given by name"):
        ctrl_rl.evaluate_policy(made[0], nothing, overrides=words)
    with pytest.raises(ConfigError, match=r"task is a DenoisingProcess; .*ControlVectorEnv\(proc"):
        ctrl_rl.evaluate_policy(made[0].unwrapped.process, nothing)
    with pytest.raises(ConfigError, match="unknown env 'mixtur2d'; did you mean 'mixture2d'"):
        ctrl_rl.evaluate_policy("mixtur2d", nothing)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda o: o["x"][0], r"the action has shape \(2,\); give \(3, 2\)"),
        (lambda o: (o["x"], None), r"a tuple of 2; .*model.predict\(observation\)\[0\]"),
        (lambda o: o["x"] * np.nan, "the action of episode 0 reaches nan"),
        (lambda o: o["x"].astype(str), "the action is of type <U"),
        ("a policy", "act is a str; give a function"),
    ],
)
def test_what_gives_no_actions_is_refused_before_the_prior_is_drawn(act: Any, words: str) -> None:
    env = gymnasium.make_vec("ctrl_rl.envs:ctrl_rl/Mixture2d-v0", num_envs=2)
    with pytest.raises(ConfigError, match=words) as caught:
        ctrl_rl.evaluate_policy(env, act)
    assert "\n" not in str(caught.value)
    assert env.unwrapped.process.prior_calls == 0


def test_what_fails_later_names_the_step() -> None:
    def act(observation: dict[str, Any]) -> NDArray[Any]:
        late = observation["step"][0] == 3
        return np.full_like(observation["x"], np.inf if late else 0)

    with pytest.raises(ConfigError, match="act, for .* episodes at step 3: .* reaches inf"):
        ctrl_rl.evaluate_policy("mixture2d", act, overrides=SHORT, plan=PLAN)


def test_observations_are_copies() -> None:
    def act(observation: dict[str, Any]) -> NDArray[Any]:
        for value in observation.values():
            value[...] = 0
        return np.zeros((len(observation["x"]), 2))

    found, plain = (
        ctrl_rl.evaluate_policy("mixture2d", each, overrides=SHORT, plan=PLAN).summary
        for each in (act, nothing)
    )
    assert found == plain and found["kl_nats"] == 0


def test_pictures_of_it_are_drawn_with_the_noise_of_the_prior() -> None:
    process = make_process("mixture2d", SHORT)
    sampler = ForeignSampler(process, nothing, control_scale=1.0)
    strip = sampler.strip({"group": 1}, title="t", n=4, seed=3)
    assert strip.latents.shape == (4, 7, 2)
    assert keys.X in sampler.policy.in_keys
