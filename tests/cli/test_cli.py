"""Help, list, plug-ins, samples: what a user of the command line sees."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import SMALL, contents, summary, train

from ctrl_rl import load_run
from ctrl_rl.cli.main import main

AGENT = '''
import torch
from tensordict import TensorDict
from torch import nn

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.agents.parts.returns import episode_kl, episode_reward


class Mine(Agent):
    """A baseline of its own beside the pathwise loss."""

    plan = RolloutPlan(gradients="pathwise")

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.baseline = nn.Parameter(torch.randn(()))

    def loss(self, rollout: TensorDict) -> TensorDict:
        value = episode_reward(rollout) - episode_kl(rollout)
        error = (value.detach() - self.baseline).square().mean()
        return TensorDict(
            {"loss_path": -value.mean(), "loss_baseline": self.weight * error}, batch_size=[]
        )
'''
REWARD = """
def upward(sample, control):
    return -(sample[:, 0] - control["level"]).square()
"""


@pytest.fixture
def plug_ins(tmp_path, monkeypatch):
    (tmp_path / "my_agent.py").write_text(AGENT)
    (tmp_path / "my_reward.py").write_text(REWARD)
    for group in ("agent", "reward"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / "agent" / "mine.yaml").write_text(
        "# An agent of my own.\n_target_: my_agent.Mine\nweight: 0.5\n"
    )
    (tmp_path / "mine" / "reward" / "upward.yaml").write_text(
        "_target_: ctrl_rl.rewards.FunctionReward\nfunction: my_reward.upward\n"
        "controls: {level: 2}\ndifferentiable: true\nupper_bound: 0.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "mine"


def test_plug_ins_from_outside(plug_ins, tmp_path, capsys):
    words = [f"--config-dir={plug_ins}", "agent=mine", "reward=upward"]
    words += ["trainer.learning_rate.critic=0.1"]
    run = train(tmp_path, "run", *words)
    assert summary(run)["agent"] == "mine"
    assert set(summary(run)["per_label"]) == {"level=0", "level=1"}
    before = contents(run)
    names = "trust=[my_agent,my_reward]"
    assert main(["train", f"resume={run}", "checkpoint=5", names]) == 0
    assert contents(run) == before  # the agent's own parameters are resumed too
    assert main(["sample", f"run={run}", "control.level=1", "n=4", names]) == 0
    capsys.readouterr()
    assert main(["list", f"--config-dir={plug_ins}"]) == 0
    assert "mine           An agent of my own." in capsys.readouterr().out


def test_plug_ins_are_checked_by_their_annotations(plug_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", *SMALL, f"--config-dir={plug_ins}", "agent=mine"]
    for word, hint in {
        "agent.weight=heavy": "agent.weight=heavy must be a number",
        "+agent.wieght=1": "did you mean 'agent.weight'",
        "~trainer.learning_rate.critic": "no trainer.learning_rate.critic",
        "reward=upward reward.controls=3": "must be a mapping",
        "reward=upward reward.function=my_reward.upwrd": "did you mean 'upward'",
    }.items():
        assert main([*words, *word.split()]) == 2
        assert hint in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_sample_writes_arrays_and_pictures(tmp_path):
    run = train(tmp_path)
    out = tmp_path / "pictures"
    assert main(["sample", f"run={run}", "control=2", "n=5", "seed=1", f"out={out}"]) == 0
    name = "sample-2-strength1-seed1"
    assert {file.name for file in out.iterdir()} == {f"{name}.npz", f"{name}.png"}
    assert np.load(out / f"{name}.npz")["samples"].shape == (5, 2)


def test_sample_takes_strengths_of_the_same_noise(tmp_path, capsys):
    run = train(tmp_path, "run", "env=digits", "kernel.num_steps=3", "trainer.updates=1")
    assert {"samples.png", "denoising.gif"} <= {file.name for file in run.iterdir()}
    words = ["sample", f"run={run}", "control=3", "n=3", f"out={tmp_path / 'out'}"]
    assert main([*words, "strengths=[0,0.5, 1]"]) == 0
    file = tmp_path / "out" / "sample-3-strengths0,0.5,1-seed0"
    drawn = np.load(f"{file}.npz")
    assert list(drawn["strengths"]) == [0, 0.5, 1]
    loaded = load_run(run)
    for strength, samples in zip((0, 0.5, 1), drawn["samples"], strict=True):
        alone = loaded.sample(3, n=3, strength=strength)
        assert np.array_equal(samples, alone.numpy())
    assert not np.array_equal(drawn["samples"][0], drawn["samples"][1])
    for path in (run / "denoising.gif", Path(f"{file}.gif")):
        with Image.open(path) as film:
            assert film.n_frames == 3 + 2  # x_0 to x_K, and the sample
    assert main(words) == 0
    assert np.array_equal(
        np.load(tmp_path / "out" / "sample-3-strength1-seed0.npz")["samples"], drawn["samples"][2]
    )
    for word, hint in {
        "strengths=[1] strength=1": "strength= or strengths=, not both",
        "strengths=0.5": "must be a list of numbers, such as [0,0.5,1,1.5,2]",
        "strengths=[]": "must be a list of numbers",
        "strengths=[1,x]": "strengths=x is not a number",
        "strengths=[1,1.0]": "names a strength twice",
        "strengths=[0,-1]": "strengths=[0,-1] must be >= 0",
    }.items():
        assert main([*words, *word.split()]) == 2
        assert hint in capsys.readouterr().err


def test_evaluate_takes_overrides(tmp_path):
    run = train(tmp_path)
    costs = summary(run)
    assert main(["evaluate", f"run={run}", "evaluation.policy_samples=8", "checkpoint=5"]) == 0
    again = summary(run / "evaluations" / "000005")  # beside the newest one's
    assert again["steps"] == 5 and again["samples"] == 24 and costs["samples"] == 48
    assert summary(run) == costs
    assert main(["evaluate", f"run={run}"]) == 0
    again = summary(run)
    assert again == costs


def test_output_fits_80_columns_and_is_quiet(tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.setenv("COLUMNS", "80")
    train(tmp_path, "run", "env=mixture1d", "logger=csv")
    told = capsys.readouterr().err
    assert all(len(line.rstrip()) <= 80 for line in told.splitlines() if str(tmp_path) not in line)
    assert "…" not in told and "Warning" not in told and "INFO" not in told
    for word in ("reward", "kl", "gap", "certified", "diversity", "exact"):
        assert word in told


def test_a_training_that_ends_worse_than_its_prior_says_so(tmp_path, capsys):
    train(tmp_path, "good", "env=mixture1d", "trainer.updates=30")
    assert "worse than no training" not in capsys.readouterr().err
    train(tmp_path, "bad", "env=mixture1d", "trainer.learning_rate.network=0.1")
    assert "worse than no training" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["sample", "--help"], []])
def test_help_is_light(words):
    code = (
        "import sys\nfrom ctrl_rl.cli.main import main\n"
        f"try:\n    main({words})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0
    shown = "control=3" if "sample" in words else "env=digits|faces|gaussian|gaussian_mean|images"
    assert shown in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


TAKEN = {
    "sample": "run control control.NAME n seed strength strengths out checkpoint trust",
    "evaluate": "run checkpoint trust evaluation.KEY",
    "export": "run out checkpoint base hub private trust",
    "train": "resume checkpoint trust",
}


@pytest.mark.parametrize("command", TAKEN)
def test_help_explains_every_word_of_a_command_about_a_run(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for word in TAKEN[command].split():
        assert re.search(rf"^  {re.escape(word)}  +\w.{{10}}", shown, re.M), word
    assert "trust=my_rewards" in shown or command != "train"
    assert all(len(line) <= 104 for line in shown.splitlines())


@pytest.mark.parametrize("command", TAKEN)
def test_commands_take_the_words_that_help_explains(command, capsys):
    for word in TAKEN[command].split():
        key = word.replace("NAME", "digit").replace("KEY", "seed")
        run = "resume=nope" if command == "train" else "run=nope"
        given = dict.fromkeys([run, "out=x", f"{key}=1"])
        if command != "export":
            given.pop("out=x")
        assert main([command, *given]) == 2
        told = capsys.readouterr().err
        assert "does not take" not in told and "; drop" not in told, told


def test_list(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "\nenv\n" in shown and "  gaussian       A Gaussian prior" in shown


def test_a_bug_keeps_its_traceback(plug_ins, tmp_path):
    (tmp_path / "my_bug.py").write_text("def f(sample, control):\n    return control['lvel']\n")
    words = ["train", *SMALL, f"run.root={tmp_path}", f"--config-dir={plug_ins}", "reward=upward"]
    with pytest.raises(KeyError):
        main([*words, "reward.function=my_bug.f"])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_a_label_that_no_prior_sample_has_leaves_its_exact_row_empty(tmp_path):
    words = ["env=digits", "kernel.num_steps=2", "trainer.updates=1", "run.name=run"]
    words += ["evaluation.prior_samples=8", "evaluation.policy_samples=3", f"run.root={tmp_path}"]
    assert main(["train", *words]) == 0
    rows = summary(tmp_path / "run")["per_label"].values()
    empty = [row for row in rows if row["exact"]["samples"] == 0]
    assert empty and all(row["exact"]["accuracy"] is None for row in empty)
    assert all(row["gap_nats"] is not None for row in rows)


def test_an_interrupt_while_a_class_is_made_is_one(monkeypatch, capsys):
    """Python 3.11 wraps it in a RuntimeError; imports make many classes."""

    class Slow:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    def importing(given):
        type("Made", (), {"field": Slow()})

    monkeypatch.setattr("ctrl_rl.cli.main._dispatch", importing)
    assert main([]) == 130
    assert capsys.readouterr().err == "ctrl-rl: interrupted\n"
