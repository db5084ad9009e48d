"""Methods that need no training: in closed form or exact, and run, loaded and drawn as agents."""

import json

import pytest
import torch
from agent_tasks import oracles
from conftest import choices
from running import summary

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.methods import ReconstructionGuidance, Rejection, prior, reconstruction_guidance
from ctrl_rl.rewards import FunctionReward
from ctrl_rl.runs.loaded import make_process

PLAN = EvaluationPlan(prior_samples=8192, policy_samples=2048, exact_samples=512)
FEW = [f"evaluation.{name}_samples=64" for name in ("prior", "policy", "exact")]


def test_rejection_has_gap_0_within_its_interval_under_every_condition() -> None:
    process = make_process("mixture2d", ["kernel.num_steps=6"])
    found = evaluate(Rejection(process=process), PLAN).summary
    low, high = found["gap_nats_ci"]
    assert low < 0 < high and high - low < 0.1
    assert found["gap_nats_certified"] < 0.2 and found["contradictions"] == []
    assert found["eubo_gap_nats"] is None and found["ess"] == 1
    intervals = [row["gap_nats_ci"] for row in found["per_label"].values()]
    inside = [low < 0 < high for low, high in intervals]
    assert sum(inside) >= len(inside) - 1  # each is a 95 % interval
    # Its KL is what the exact conditional needs, from other samples.
    assert found["kl_nats"] == pytest.approx(found["exact"]["kl_nats"], abs=0.1)


def test_accepted_episodes_have_the_tilted_law() -> None:
    """Means under p e^r / Z, by importance weights of other samples of the prior."""
    process = make_process("mixture2d", ["kernel.num_steps=6"])
    condition = {"group": 1}
    drawn = Rejection(process=process).draw(condition, n=4096, batch_size=4096, seed=10_000)
    plain = prior(process=process).draw(condition, n=16384, batch_size=4096, seed=50_000)
    weight = plain.reward.double().softmax(0)
    for value in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x.square().sum(1)):
        sampled, weighted = value(drawn.sample).double(), value(plain.sample).double()
        mean = (weight * weighted).sum()
        error = (weight.square() * (weighted - mean).square()).sum() + sampled.var() / 4096
        assert (sampled.mean() - mean).abs() < 4 * error.sqrt()


def test_a_strip_of_rejection_has_every_row_under_its_own_condition() -> None:
    process = make_process("mixture2d", ["kernel.num_steps=6"])
    groups = torch.arange(4).repeat_interleave(64)
    strip = Rejection(process=process).strip({"group": groups}, title="t", n=256, seed=3)
    assert strip.latents.shape == (256, 7, 2) and strip.samples.shape == (256, 2)
    seen = process.predict(strip.samples)
    assert seen is not None
    share = (seen["group"] == groups).double().mean()
    reward = process.reward(strip.samples, {"group": groups}).exp().mean()
    assert share > 0.8 and reward > 0.7  # chance is a quarter
    assert not strip.paired  # no column of a picture has the noise of another row
    assert prior(process=process).strip({"group": 1}, title="t", n=4, seed=3).paired
    again = Rejection(process=process).strip({"group": groups[:60]}, title="t", n=60, seed=3)
    torch.testing.assert_close(again.samples, strip.samples[:60])  # not of the others


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_reconstruction_guidance_has_its_closed_form_on_the_gaussian_task(strength: float) -> None:
    process = make_process("gaussian", ["kernel.num_steps=6"])
    plan = EvaluationPlan(prior_samples=1024, policy_samples=8192, exact_samples=0)
    found = evaluate(reconstruction_guidance(process=process, strength=strength), plan).summary
    for oracle, row in zip(oracles(process), found["per_label"].values(), strict=True):
        variance = oracle.sigmas[:, None] ** 2
        shifts = strength * variance * oracle.value_weights[:-1]
        missed = ((shifts - oracle.optimal_shifts) ** 2 / (2 * variance)).sum()
        assert row["soft_return"] == pytest.approx(oracle.optimal_soft_return - missed, abs=0.02)
        assert row["kl_nats"] == pytest.approx((shifts**2 / (2 * variance)).sum(), rel=1e-3)


def test_reconstruction_guidance_beats_the_prior_where_rewards_are_not_linear() -> None:
    process = make_process("mixture2d", ["kernel.num_steps=10"])
    plan = EvaluationPlan(prior_samples=2048, policy_samples=1024, exact_samples=0)
    found = evaluate(reconstruction_guidance(process=process), plan).summary
    assert found["gap_nats_ci"][1] < found["prior"]["gap_nats"] - 0.5


def test_the_prior_has_the_gap_of_the_priors_row() -> None:
    process = make_process("mixture2d", ["kernel.num_steps=6"])
    found = evaluate(prior(process=process), PLAN).summary
    assert found["kl_nats"] == 0
    assert found["gap_nats"] == pytest.approx(found["prior"]["gap_nats"], abs=0.15)


@pytest.mark.parametrize("name", [name for name in choices("method") if name != "lora"])
def test_every_method_is_evaluated_loaded_and_drawn(name: str, tmp_path, capsys) -> None:
    words = ["evaluate", f"method={name}", "env=mixture2d", "kernel.num_steps=4", *FEW]
    words += [f"run.root={tmp_path}"]
    assert main(words) == 0
    folder = tmp_path / f"mixture2d-{name}-s0"
    found = summary(folder)
    assert (found["agent"], found["task"], found["steps"]) == (name, "mixture2d", 0)
    assert (folder / "samples.png").is_file() and "worse than" not in capsys.readouterr().err
    assert main(words) == 2  # the folder is there
    run = load_run(folder)
    assert run.sample("1", n=3).shape == (3, 2)
    assert torch.equal(run.sample(1, n=3, seed=2), run.sample(1, n=3, seed=2))
    assert main(["evaluate", f"run={folder}"]) == 0
    again = summary(folder)
    assert json.dumps(again) == json.dumps(found)
    out = tmp_path / "drawn"
    assert main(["sample", f"run={folder}", "control=1", "n=4", f"out={out}"]) == 0
    assert len(list(out.glob("*.png"))) == 1


def blind(sample, control):
    return -sample.detach().square().sum(1)


def test_what_a_method_needs_is_refused_by_name(capsys, tmp_path) -> None:
    gaussian = make_process("gaussian", ["kernel.num_steps=4"])  # a linear reward has no bound
    with pytest.raises(ConfigError, match="method=rejection needs a reward with an upper bound"):
        Rejection(process=gaussian)
    mixture = make_process("mixture2d", ["kernel.num_steps=4"])
    with pytest.raises(ConfigError, match=r"accepted \d of 8 samples in 8 trials for group=1"):
        Rejection(process=mixture, trials=8).draw({"group": 1}, n=8, batch_size=8, seed=0)
    with pytest.raises(ConfigError, match=r"accepted \d of 8 samples in 8 trials for two"):
        Rejection(process=mixture, trials=8).strip({"group": 1}, title="two", n=8, seed=0)
    with pytest.raises(ConfigError, match="has no drift|drift of a policy"):
        Rejection(process=mixture).at_strength(2.0)
    with pytest.raises(ConfigError, match="has no policy"):
        _ = Rejection(process=mixture).policy
    with pytest.raises(ConfigError, match="method.strength=-1"):
        ReconstructionGuidance(mixture, strength=-1)
    gaussian.reward_model = FunctionReward(function=blind, controls={}, differentiable=False)
    with pytest.raises(ConfigError, match="FunctionReward is not differentiable"):
        ReconstructionGuidance(gaussian)
    assert main(["evaluate", "method=rejectoin", "env=mixture2d", f"run.root={tmp_path}"]) == 2
    assert "rejection" in capsys.readouterr().err
    assert main(["evaluate", "method=rejection", "method.trials=0", f"run.root={tmp_path}"]) == 2
    assert "method.trials=0 must be 1 or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "no folder is left by what was refused"


def test_a_strength_scales_the_drift_of_a_method_that_has_one() -> None:
    process = make_process("gaussian", ["kernel.num_steps=4"])
    sampler = reconstruction_guidance(process=process)
    half = sampler.at_strength(0.5)
    assert isinstance(half, PolicySampler)
    same = reconstruction_guidance(process=process, strength=0.5)
    one, other = (each.strip({"direction": 1}, title="", n=4, seed=0) for each in (half, same))
    torch.testing.assert_close(one.samples, other.samples)
