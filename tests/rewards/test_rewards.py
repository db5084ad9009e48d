"""Rewards against their formulas; what is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import own_reward, summary, train
from torch import Tensor, nn

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.conditions import label_counts
from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards import ClassifierReward, FunctionReward, LinearReward, MixtureClassifier

MEANS = [[-1.8], [-0.6], [0.6], [1.8]]


def points(n: int, dims: int = 1) -> Tensor:
    return 2 * torch.randn(n, dims, generator=torch.Generator().manual_seed(0))


def inner_or_outer(std: float = 0.4) -> MixtureClassifier:
    return MixtureClassifier(means=MEANS, groups=[0, 1, 1, 0], std=std)


def test_mixture_classifier_is_bayes_rule() -> None:
    x = points(50)
    density = torch.stack(
        [torch.distributions.Normal(m[0], 0.4).log_prob(x[:, 0].double()).exp() for m in MEANS], 1
    )
    joint = torch.stack([density[:, 0] + density[:, 3], density[:, 1] + density[:, 2]], 1)
    exact = (joint / joint.sum(1, keepdim=True)).log()
    torch.testing.assert_close(
        inner_or_outer().log_probabilities(x).double(), exact, rtol=1e-4, atol=1e-4
    )


def test_mixture_classifier_is_finite_with_a_gradient_far_away() -> None:
    x = torch.tensor([[-50.0], [50.0]]).requires_grad_()
    log_prob = inner_or_outer().log_probabilities(x)
    log_prob[:, 1].sum().backward()
    assert torch.isfinite(log_prob).all()
    # Far out the nearest two components decide: slope (c_2 - c_3) / s^2 and its mirror image.
    torch.testing.assert_close(x.grad, torch.tensor([[1.2], [-1.2]]) / 0.4**2)


def test_controls_add_up_with_their_weights() -> None:
    first, second = inner_or_outer(), inner_or_outer(std=1.0)
    reward = ClassifierReward(classifiers={"a": first, "b": second}, weights={"b": 2.5})
    x = points(20)
    a, b = torch.arange(20) % 3, torch.arange(20) // 3 % 3  # 2 is the null label
    parts = [torch.cat([m.log_probabilities(x), torch.zeros(20, 1)], 1) for m in (first, second)]
    rows = torch.arange(20)
    exact = parts[0][rows, a] + 2.5 * parts[1][rows, b]
    torch.testing.assert_close(reward(x, {"a": a, "b": b}), exact)
    assert label_counts(reward.controls) == {"a": 2, "b": 2} and reward.upper_bound == 0
    predicted = reward.predict(x)
    assert torch.equal(predicted["a"], (x[:, 0].abs() < 1.2).long())


def test_classifier_reward_stays_frozen_and_in_evaluation_mode() -> None:
    class Noisy(nn.Module):
        num_labels = 2

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5))

        def log_probabilities(self, x: Tensor) -> Tensor:
            return self.layers(x).log_softmax(1)

    reward = ClassifierReward(classifiers={"y": Noisy()})
    nn.Sequential(reward).train()
    x, control = points(8).requires_grad_(), {"y": torch.zeros(8, dtype=torch.int64)}
    assert torch.equal(reward(x, control), reward(x, control))
    reward(x, control).sum().backward()
    assert x.grad is not None and (x.grad != 0).any()
    assert all(p.grad is None for p in reward.parameters())


def test_linear_reward_is_a_dot_product() -> None:
    reward = LinearReward(weights=[[1.0, 2.0], [-3.0, 0.5]])
    x = points(3, 2)
    value = reward(x, {"direction": torch.tensor([0, 1, 2])})
    exact = torch.stack([x[0, 0] + 2 * x[0, 1], -3 * x[1, 0] + 0.5 * x[1, 1], torch.tensor(0.0)])
    torch.testing.assert_close(value, exact)


def brightness(sample: Tensor, control: Any) -> Tensor:
    return -(sample.mean(1) - control["level"]).square()


def test_function_reward_is_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_module.py").write_text(
        "def brightness(sample, control):\n"
        "    return -(sample.mean(1) - control['level']).square()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings: dict[str, Any] = {"controls": {"level": 2}, "upper_bound": 0.0}
    dotted = FunctionReward(
        function="my_rewards_module.brightness", differentiable=True, **settings
    )
    given = FunctionReward(function=brightness, differentiable=False, **settings)
    x, control = points(4, 3).requires_grad_(), {"level": torch.tensor([0, 1, 1, 0])}
    assert torch.equal(dotted(x, control), brightness(x, control))
    assert dotted(x, control).requires_grad and not given(x, control).requires_grad
    assert torch.equal(given(x, control), brightness(x, control))
    sys.modules.pop("my_rewards_module")


def test_function_reward_takes_what_numpy_gives() -> None:
    reward = FunctionReward(
        function=lambda sample, control: sample.numpy().sum(1), controls={}, differentiable=False
    )
    x = points(4, 3)
    value = reward(x, {})
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, x.sum(1))


def test_a_run_without_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def near(sample, control):\n    return -(sample - 1).square().sum(1)\n"
    monkeypatch.syspath_prepend(tmp_path)
    run = train(tmp_path, "run", *own_reward(tmp_path, code, name="near"))
    found = summary(run)
    assert list(found["per_label"]) == ["(none)"] and found["accuracy"] is None
    assert 0 < found["kl_nats"] and 0 <= found["gap_nats"] <= found["gap_nats_certified"]
    assert main(["sample", f"run={run}", "n=3", "trust=my_near"]) == 0
    drawn = np.load(run / "sample-none-strength1-seed0.npz")["samples"]
    loaded = load_run(run, trust=["my_near"])
    np.testing.assert_array_equal(drawn, loaded.sample(n=3).numpy())
    assert main(["sample", f"run={run}", "control=1", "trust=my_near"]) == 2
    assert "this run has no control" in capsys.readouterr().err


def test_a_bound_that_does_not_hold_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def far(sample, control):\n    return (sample - 1).square().sum(1)\n"  # its bound is 0
    monkeypatch.syspath_prepend(tmp_path)
    words = [*own_reward(tmp_path, code, name="far"), f"run.root={tmp_path / 'runs'}"]
    assert main(["train", "env=gaussian", *words]) == 2
    assert "above its stated upper bound 0; state one that holds" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: LinearReward(weights=[1.0, 2.0]), "must be"),  # type: ignore[list-item]
        (lambda: inner_or_outer(std=0.0), "must be > 0"),
        (lambda: MixtureClassifier(means=MEANS, groups=[0, 1], std=1), "give one per mean"),
        (lambda: MixtureClassifier(means=MEANS, groups=[0, 2, 2, 0], std=1), "use every label"),
        (
            lambda: ClassifierReward(classifiers={"digit": inner_or_outer()}, weights={"digt": 1}),
            "did you mean 'digit'",
        ),
        (
            lambda: ClassifierReward(classifiers={"y": inner_or_outer()}, weights={"y": 0}),
            "must be > 0",
        ),
        (lambda: ClassifierReward(classifiers={"y": "net"}), "got str"),  # type: ignore[dict-item]
        (
            lambda: FunctionReward(function="nowhere.f", controls={}, differentiable=True),
            "there is no module nowhere here; run from the folder that has it",
        ),
        (
            lambda: FunctionReward(function="math.sqr", controls={}, differentiable=True),
            "did you mean 'sqrt'",
        ),
        (
            lambda: FunctionReward(
                function=lambda x, y: x.mean(), controls={}, differentiable=True
            )(points(3), {}),
            r"must give floating point of shape \(3,\)",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_the_fix(make: Any, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        make()
