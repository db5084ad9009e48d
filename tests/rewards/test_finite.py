"""Samples and rewards that are not finite are refused where every reward is called."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import own_reward
from torch import Tensor, nn

from ctrl_rl.cli.main import main
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError, NonFiniteError
from ctrl_rl.rewards import ClassifierReward, FunctionReward, LinearReward
from ctrl_rl.rewards.jpeg import jpeg_kilobytes
from ctrl_rl.runs.build import build_process
from ctrl_rl.runs.compose import compose
from ctrl_rl.runs.loaded import make_env

BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture(scope="module")
def jpeg() -> DenoisingProcess:
    words = ["env=digits", "reward=jpeg", "reward.classifiers.size.edges=[-0.9]"]
    return build_process(compose("train", [*words, "~evaluation.heldout.digit"]))


def process_with(reward: Any) -> DenoisingProcess:
    gaussian = make_env("gaussian", num_envs=1).process
    return DenoisingProcess(prior=gaussian.prior, kernel=gaussian.kernel, reward=reward)


@pytest.mark.parametrize("value", BAD)
def test_a_picture_with_one_bad_pixel_has_no_reward(jpeg: DenoisingProcess, value: float) -> None:
    sample, control = torch.zeros(3, 1, 8, 8), {"size": torch.tensor([0, 1, 0])}
    assert torch.isfinite(jpeg.reward(sample, control)).all()
    sample[1, 0, 4, 5] = value
    with pytest.raises(NonFiniteError, match=f"a value of {value} for size=1: .*learning_rate"):
        jpeg.reward(sample, control)


@pytest.mark.parametrize("value", BAD)
def test_a_bad_pixel_has_no_file_size(value: float) -> None:
    image = torch.zeros(3, 3, 8, 8)
    good = jpeg_kilobytes(image)
    image[1, 2, 4, 5] = value
    sizes = jpeg_kilobytes(image)
    assert sizes[1].isnan() and torch.equal(sizes[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("value", BAD)
def test_a_reward_that_hides_the_value_is_not_asked(value: float) -> None:
    def hiding(sample: Tensor, control: Any) -> Tensor:
        return sample.nan_to_num(0, 0, 0).sum(1)

    process = process_with(FunctionReward(function=hiding, controls={"a": 2}, differentiable=True))
    sample = torch.tensor([[1.0], [value]])
    with pytest.raises(NonFiniteError, match=f"a sample has a value of {value} for a=1"):
        process.reward(sample, {"a": torch.tensor([0, 1])})


def test_a_classifiers_nan_is_named() -> None:
    class Broken(nn.Module):
        num_labels = 2

        def log_probabilities(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0], x[:, 0] * math.nan], 1)

    process = process_with(ClassifierReward(classifiers={"hat": Broken()}))
    sample = torch.zeros(2, 1)
    with pytest.raises(NonFiniteError, match="the reward is nan for hat=1"):
        process.reward(sample, {"hat": torch.tensor([0, 1])})
    # Label 0 and the null label do not read it.
    assert process.reward(sample, {"hat": torch.tensor([0, 2])}).tolist() == [0, 0]


def test_a_diverged_policy_names_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = "sample[:, 0].nan_to_num(0, 0, 0).clamp(-1, 1) - 1"
    code = f"def hiding(sample, control):\n    return {hidden}\n"
    monkeypatch.syspath_prepend(tmp_path)
    words = [*own_reward(tmp_path, code, name="hiding", differentiable=False), "agent=reinforce"]
    words += ["trainer.updates=3", "trainer.learning_rate.network=1e36", "logger=none"]
    words += [f"run.root={tmp_path}", "run.name=diverged"]
    assert main(["train", "env=gaussian", *words]) == 2
    told = capsys.readouterr().err
    assert "update 2: a sample has a value of" in told
    assert f"the last good checkpoint is {tmp_path}/diverged/checkpoints/000000" in told


@pytest.mark.parametrize(
    ("result", "given"),
    [
        (lambda sample: sample, r"torch.float32 of shape \(3, 2\)"),
        (lambda sample: sample.mean(), r"torch.float32 of shape \(\)"),
        (lambda sample: (sample > 0).sum(1), r"torch.int64 of shape \(3,\)"),
        (lambda sample: (sample > 0).all(1), r"torch.bool of shape \(3,\)"),
        (lambda sample: sample.sum(1) + 0j, r"torch.complex64 of shape \(3,\)"),
        (lambda sample: None, "a NoneType"),
        (lambda sample: "high", "a str"),
    ],
)
def test_results_that_are_no_nats_per_sample_are_refused_by_name(result: Any, given: str) -> None:
    def mine(sample: Tensor, control: Any) -> Any:
        return result(sample)

    reward = FunctionReward(function=mine, controls={}, differentiable=True)
    with pytest.raises(ConfigError, match=rf"mine gave {given}.*must give .* of shape \(3,\)"):
        reward(torch.ones(3, 2), {})


def test_results_of_reward_classes_are_checked_too() -> None:
    class Mine(LinearReward):
        def forward(self, sample: Tensor, control: Any) -> Tensor:
            return super().forward(sample, control)[:, None]

    process = process_with(Mine(weights=[[1.0]]))
    with pytest.raises(ConfigError, match=r"Mine gave torch.float32 of shape \(2, 1\)"):
        process.reward(torch.ones(2, 1), {"direction": torch.zeros(2, dtype=torch.int64)})


@pytest.mark.parametrize("bound", BAD)
def test_a_bound_that_is_not_finite_is_refused(bound: float) -> None:
    with pytest.raises(ConfigError, match="must be finite, or null"):
        FunctionReward(function=sum, controls={}, differentiable=True, upper_bound=bound)
