"""`env=images`: the commands of docs/pipelines.md on small pipelines, and what is left open."""

import re
import shlex
from pathlib import Path

import pytest
from running import SMALL, metrics, summary

from ctrl_rl import load_run
from ctrl_rl.cli.main import main

TEXT = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
SECTION = TEXT.partition("## Your own pipeline")[2].partition("\n## ")[0]
FOUND = re.findall(r"```bash\nctrl-rl (.*?)```", SECTION.replace("\\\n", " "), re.S)
COMMANDS = [shlex.split(found) for found in FOUND]
QUICK = [word for word in SMALL if not word.startswith("env=")]
QUICK += ["kernel.num_steps=3", "trainer.updates=2", "trainer.batch_size=4"]
QUICK += ["evaluation.prior_samples=8", "evaluation.policy_samples=4"]
STANDS_FOR = {"my/ddpm": "pipeline", "my/sd": "sd", "my/classifier": "classifier"}


@pytest.mark.parametrize(("place", "agent"), [(0, "ppo"), (1, "ctrl")])
def test_the_commands_of_the_page_run(place, agent, tmp_path, made):
    words = []
    for word in COMMANDS[place]:
        key, _, value = word.partition("=")
        words.append(f"{key}={made(STANDS_FOR[value])}" if value in STANDS_FOR else word)
    assert len(COMMANDS) == 2
    assert main([*words, *QUICK, f"run.root={tmp_path}", "run.name=run"]) == 0
    run = tmp_path / "run"
    assert len(metrics(run)) == 2 and summary(run)["agent"] == agent
    assert summary(run)["task"] == "images" and (run / "samples.png").is_file()
    loaded = load_run(run)
    controls = loaded.env.process.controls
    (name,) = controls
    assert controls[name].size == (2 if place == 0 else 3)
    drawn = loaded.sample({name: 1, **({"prompt": "a cat"} if place else {})}, n=2)
    assert drawn.shape[0] == 2


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "no value for reward; add reward=…, one of aesthetic, clip,"),
        (["reward=jpeg"], "no value for prior.path; add prior.path=…"),
        (["reward=jpeg", "prior.path=PATH"], "reward=jpeg is not differentiable"),
    ],
)
def test_what_is_left_open_is_asked_for(words, fix, tmp_path, made, capsys):
    given = [word.replace("PATH", str(made("pipeline"))) for word in words]
    assert main(["train", "env=images", *given, f"run.root={tmp_path}"]) == 2
    told = capsys.readouterr().err.strip()
    assert fix in told and told.count("\n") == 0
    assert list(tmp_path.iterdir()) == []
