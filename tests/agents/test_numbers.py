"""Controls that are numbers: baselines by regression, log Z as a function, who is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from agent_tasks import noisy_drift
from batches import first_batch
from conftest import choices
from running import SMALL, summary
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys, load_run
from ctrl_rl.agents.parts.advantages import baseline, condition_index, leave_one_out_mean
from ctrl_rl.agents.parts.critics import LogPartition
from ctrl_rl.agents.plan import TaskSpec
from ctrl_rl.cli.main import main
from ctrl_rl.controls import Categorical, Continuous
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.numbers import draw_asked
from ctrl_rl.rewards import FunctionReward, MeanShift, Reward
from ctrl_rl.runs.build import build_agent, build_process
from ctrl_rl.runs.compose import compose
from ctrl_rl.runs.loaded import make_env

COMPARE = {"vargrad", "grpo", "nft", "rwr", "d3po"}  # episodes of the same condition
B = 40
BOTH = "rewards: {a: {_target_: ctrl_rl.rewards.LinearReward, weights: [[1, 0], [0, 1]]}, b: "
BOTH += "{_target_: ctrl_rl.rewards.MeanShift, direction: [1, 1], mean: 0.0, std: 0.5, low: -1, "
BOTH += "high: 1}}"


def rollout_of(seed: int = 0, **given: Tensor) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    control = {
        "hue": torch.randint(3, (B,), generator=generator),
        "mean": torch.rand(B, generator=generator) * 2,
    } | given
    wide = {name: values[:, None].expand(B, 2) for name, values in control.items()}
    return TensorDict({keys.CONTROL: wide, keys.STEP: torch.zeros(B, 2)}, batch_size=[B, 2])


def test_the_baseline_is_fitted_to_the_other_episodes() -> None:
    """For every episode by itself, against numpy's least squares of the rest."""
    rollout = rollout_of()
    values = torch.randn(B, 3, generator=torch.Generator().manual_seed(1)).double()
    found = baseline(values, rollout)
    hue = rollout[keys.CONTROL, "hue"][:, 0].numpy()
    mean = rollout[keys.CONTROL, "mean"][:, 0].double().numpy()
    z = (mean - mean.mean()) / mean.std(ddof=1)
    means = [(hue == label).astype(float) for label in range(3)]
    design = np.stack([*means, z, z**2, z**3, *(mean_of * z for mean_of in means)], 1)
    # Ridge as rows: a penalty of 1 on the shapes is an observation of 0 for each of them.
    rows = np.eye(9)[3:]
    for left in range(B):
        kept = np.arange(B) != left
        a = np.concatenate([design[kept], rows])
        b = np.concatenate([values[kept].numpy(), np.zeros((6, 3))])
        expected = design[left] @ np.linalg.lstsq(a, b, rcond=None)[0]
        np.testing.assert_allclose(found[left].numpy(), expected, atol=1e-6)


def test_an_episodes_own_value_is_no_part_of_its_baseline() -> None:
    rollout = rollout_of()
    values = torch.zeros(B, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda v: baseline(v, rollout), values)
    assert jacobian.diagonal().abs().max() < 1e-9 and jacobian.abs().max() > 0.01


def test_a_baseline_knows_what_a_number_explains() -> None:
    rollout = rollout_of()
    control = rollout[keys.CONTROL]
    slope = control["hue"][:, 0] - 1
    truth = 5.0 * control["hue"][:, 0] + slope * (control["mean"][:, 0] - 0.5)
    noise = 0.1 * torch.randn(B, generator=torch.Generator().manual_seed(2))
    left = truth + noise - baseline(truth + noise, rollout)
    by_mean = truth - leave_one_out_mean(truth, torch.zeros(B, dtype=torch.int64))
    assert left.std() < 0.15 < 0.5 * by_mean.std()


def test_of_labels_alone_the_baseline_is_their_mean() -> None:
    rollout = rollout_of()
    rollout[keys.CONTROL] = rollout[keys.CONTROL].exclude("mean")
    values = torch.randn(B)
    expected = leave_one_out_mean(values, condition_index(rollout))
    assert torch.equal(baseline(values, rollout), expected)


@pytest.mark.parametrize("mean", [torch.full((B,), math.nan), torch.full((B,), 0.5)])
def test_numbers_that_say_nothing_leave_the_means_of_labels(mean: Tensor) -> None:
    rollout = rollout_of(mean=mean)
    values = torch.randn(B, generator=torch.Generator().manual_seed(3))
    expected = leave_one_out_mean(values, rollout[keys.CONTROL, "hue"][:, 0])
    torch.testing.assert_close(baseline(values, rollout), expected, atol=1e-5, rtol=1e-5)


def test_log_z_is_a_function_of_a_number_for_every_label() -> None:
    controls = {"mean": Continuous(-1.0, 1.0), "hue": Categorical.of(2)}
    log_z = LogPartition(TaskSpec(shape=(2,), num_steps=3, controls=controls))
    mean = torch.linspace(-1, 1, 60).repeat(3)
    hue = torch.arange(3).repeat_interleave(60)  # 2 asks for nothing
    asked = {"mean": mean, "hue": hue}
    assert (log_z(asked) == 0).all()
    target = (1 + hue) * mean**2 - hue
    optimizer = torch.optim.Adam(log_z.parameters(), lr=0.05)
    for _ in range(600):
        loss = (log_z(asked) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.005 * target.var()
    nothing = {"mean": torch.full((3,), math.nan), "hue": torch.arange(3)}
    assert torch.equal(log_z(nothing), log_z.table.weight[:, 0])


@pytest.mark.parametrize("name", choices("agent"))
def test_every_agent_takes_numbers_or_is_refused_by_name(name: str) -> None:
    config = compose("train", ["env=gaussian_mean", f"agent={name}", "kernel.num_steps=3"])
    process = build_process(config)
    if name in COMPARE or name == "h_transform":
        why = f"agent={name} compares" if name in COMPARE else "learns the soft values of all"
        with pytest.raises(ConfigError, match=why):
            build_agent(config, process)
        return
    agent = build_agent(config, process)
    env = make_env("gaussian_mean", num_envs=16, overrides=["kernel.num_steps=3"])
    losses = agent.loss(first_batch(env, noisy_drift(env, "gaussian_mean"), agent))
    for key, loss in losses.items():
        assert torch.isfinite(loss), key


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    small = [word for word in SMALL if not word.startswith("env=")]
    words = ["env=gaussian_mean", "trainer.updates=12", "evaluation.most_conditions=3"]
    assert main(["train", *small, *words, f"run.root={root}", "run.name=run"]) == 0
    return root / "run"


def test_an_evaluation_draws_numbers_and_says_what_samples_show(run: Path) -> None:
    found = summary(run)
    assert found["conditions"] == {"measured": 3, "in_all": None}
    assert (run / "asked.png").stat().st_size > 5_000
    for name, row in found["per_label"].items():
        assert -0.5 <= float(name.removeprefix("mean=")) <= 1.5
        assert math.isfinite(row["shown"]["mean"]["mean"]) and row["accuracy"] is None
    json.dumps(found, allow_nan=False)


def test_a_run_is_asked_for_a_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_run(run)
    asked = loaded.sample(1.25, n=4, seed=1)
    assert torch.equal(loaded.sample({"mean": "1.25"}, n=4, seed=1), asked)
    assert torch.equal(loaded.sample({"mean": [1.25] * 4}, n=4, seed=1), asked)
    assert not torch.equal(loaded.sample(-0.25, n=4, seed=1), asked)
    assert torch.isfinite(loaded.sample(n=4, seed=1)).all()
    assert main(["sample", f"run={run}", "control=1.6"]) == 2
    assert "use numbers from -0.5 to 1.5, or any" in capsys.readouterr().err
    rows = loaded.evaluate(conditions=[{"mean": 1.0}, {}]).summary["per_label"]
    assert list(rows) == ["mean=1", "mean=any"]
    assert rows["mean=any"]["reward"] == 0 and not draw_asked(run / "none.png", [], title="")


def test_the_mean_of_an_exact_sample_is_what_was_asked_for() -> None:
    """Importance weights e^r on a Gaussian move its mean to the number, and sum to 1."""
    reward = MeanShift(direction=[3, 4], mean=0.2, std=0.5, low=-1, high=1)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400_000, 2, generator=generator) * 0.5 + torch.tensor([1.0, -0.5])
    for asked in (-0.3, 0.2, 0.6):
        control = {"mean": torch.full((len(sample),), asked)}
        weights = reward(sample, control).double().exp()
        assert abs(weights.mean() - 1) < 0.02
        shown = reward.predict(sample)["mean"].double()
        assert abs((weights * shown).mean() / weights.mean() - asked) < 0.02


def test_a_function_is_not_asked_where_nothing_is() -> None:
    """Its gradient there is 0 even where it would be none; a null beside a value is NaN to it."""

    def ratio(sample: Tensor, control: dict[str, Tensor]) -> Tensor:
        return -(sample[:, 0] / control["place"]).square()

    controls = {"place": {"low": 0.5, "high": 2.0}, "hat": ["no", "yes"]}
    reward = FunctionReward(function=ratio, controls=controls, differentiable=True)
    sample = torch.ones(3, 2, requires_grad=True)
    place = torch.tensor([1.0, math.nan, math.nan])
    value = reward(sample, {"place": place, "hat": torch.tensor([0, 2, 1])})
    assert value[0] == -1 and value[1] == 0 and value[2].isnan()
    (gradient,) = torch.autograd.grad(value[:2].sum(), sample)
    assert gradient[0, 0] == -2 and (gradient[1] == 0).all()


def test_controls_in_the_body_of_a_class() -> None:
    class Mine(Reward):
        controls = {"hat": ["no", "yes"], "place": {"low": 0, "high": 1}}
        differentiable, upper_bound = True, 0.0

        def forward(self, sample: Tensor, control: dict[str, Tensor]) -> Tensor:
            return -sample.square().sum(1)

    reward = Mine()
    assert reward.controls == {"hat": Categorical(("no", "yes")), "place": Continuous(0.0, 1.0)}
    with pytest.raises(ConfigError, match="name the labels in controls"):
        reward.label_names = {"hat": ["off", "on"]}


@pytest.mark.parametrize("agent", ["ctrl", "tb", "ppo_critic"])
def test_a_label_and_a_number_are_asked_for_at_once(agent: str, tmp_path: Path) -> None:
    (tmp_path / "mine" / "reward").mkdir(parents=True)
    text = f"_target_: ctrl_rl.rewards.WeightedSum\n{BOTH}\n"
    (tmp_path / "mine" / "reward" / "both.yaml").write_text(text)
    small = [word for word in SMALL if not word.startswith("env=")]
    words = [f"--config-dir={tmp_path / 'mine'}", "env=gaussian", "reward=both", f"agent={agent}"]
    more = ["evaluation.most_conditions=4", f"run.root={tmp_path}", "run.name=run"]
    assert main(["train", *small, *words, "trainer.updates=3", *more]) == 0
    names = list(summary(tmp_path / "run")["per_label"])
    assert len(names) == 4
    assert all(name.startswith("direction=") and ", mean=" in name for name in names)
