"""A run means the same in every folder: existing relative paths of its config are absolute."""

import shutil
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from running import SMALL, own_reward, train

from ctrl_rl import load_run
from ctrl_rl.assets import anchor_paths
from ctrl_rl.cli.main import main
from ctrl_rl.runs.compose import compose
from ctrl_rl.runs.resuming import difference

CODE = """def elsewhere(sample, control):
    return -(sample[:, 0] - control["level"]).square()
"""
SHIPPED = Path(__file__).parents[2] / "ctrl_rl" / "assets" / "digits"


@pytest.fixture
def a(tmp_path, monkeypatch):
    """A folder with models, the working directory."""
    folder = tmp_path / "a"
    (folder / "models").mkdir(parents=True)
    for name in ("classifier", "heldout", "prior"):
        shutil.copytree(SHIPPED / name, folder / "models" / name)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_run_with_relative_paths_works_from_another_folder(a, monkeypatch):
    words = ["env=digits", "kernel.num_steps=2", "trainer.updates=1", "prior.path=models/prior"]
    words += ["reward.classifiers.digit.folder=models/classifier"]
    words += ["evaluation.heldout.digit.folder=./models/heldout"]
    run = train(a, "run", *words)
    monkeypatch.chdir(a.parent / "b")
    loaded = load_run(run)
    assert loaded.config.prior.path == str(a / "models" / "prior")
    assert loaded.sample(3, n=2).shape == (2, 1, 8, 8)
    for words in (["sample", "control=3", "n=1", "out=."], ["evaluate"]):
        assert main([words[0], f"run={run}", *words[1:]]) == 0
    (run / "summary.json").unlink()
    assert main(["train", f"resume={run}"]) == 0 and (run / "summary.json").is_file()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["prior=diffusers", "prior.path=PLACE"], "prior.path"),
        (["reward=jpeg", "+reward.classifiers.size.weights_file=PLACE"], ""),
        (
            ["reward=aesthetic", "reward.classifiers.aesthetic.measure.head=PLACE"],
            "reward.classifiers.aesthetic.measure.head",
        ),
        (["reward=image_classifier", "reward.classifiers.label.path=PLACE"], ""),
        (["reward=pick_score", "reward.score.processor=PLACE"], "reward.score.processor"),
        (["reward=image_reward", "reward.score.weights=PLACE"], "reward.score.weights"),
        (["reward=image_reward", "reward.score.tokenizer=PLACE"], "reward.score.tokenizer"),
        (["reward=sd_compressibility", "reward.classifiers.size.folder=PLACE"], ""),
        (
            ["reward=weighted_sum", "reward.rewards={x: {_target_: my.R, parts: [{_target_: my.P, "
             "path: PLACE}]}}"],
            "reward.rewards.x.parts[0].path",
        ),
    ],
)  # fmt: skip
def test_every_key_of_a_path(a, words, key):
    (a / "owner").mkdir()
    shutil.copytree("models/prior", "owner/there")
    key = key or words[-1].lstrip("+").partition("=")[0]
    for given, stored in {
        "owner/there": str(a / "owner" / "there"),
        "../a/owner": f"{a}/../a/owner",
        "owner/elsewhere": "owner/elsewhere",  # an id on the hub
        "package://digits/prior": "package://digits/prior",
        str(a): str(a),
        "~/there": "~/there",
    }.items():
        filled = [word.replace("PLACE", f"'{given}'") for word in words]
        assert OmegaConf.select(compose("train", filled), key) == stored


def test_the_path_of_a_dataset(a):
    config = compose("classifier", ["dataset=npz", "dataset.path=models"])
    assert config.dataset.path == str(a / "models")


def test_what_is_no_path_stays(a):
    """Prompts, labels and names of code that are also names of files."""
    for name in ("cat", "torchrl.objectives.SACLoss", "text", "ddpm"):
        (a / name).write_text("x")
    words = ["env=sd_aesthetic", "reward=clip", "reward.classifiers.text.texts=[cat,text]"]
    config = compose("train", [*words, "agent=sac", "prior.prompts=[cat]", "run.name=cat"])
    assert config.prior.prompts == ["cat"] and config.run.name == "cat"
    assert config.reward.classifiers.text.texts == ["cat", "text"]
    assert config.agent.objective.path == "torchrl.objectives.SACLoss"
    assert config.run.root == "runs"
    plain = {"path": "cat", "weights": {"path": "cat"}, "x": [1, None, {"path": "cat"}]}
    before = str(plain)
    anchor_paths(plain)  # no node of a part
    assert str(plain) == before


def test_a_cell_is_compared_by_what_its_paths_mean(a, monkeypatch):
    words = ["env=digits", "prior.path=models/prior"]
    asked = compose("train", words)
    cell = a / "cell"
    cell.mkdir()
    for stored in (asked.prior.path, "models/prior"):  # the latter by an earlier version
        config = asked.copy()
        config.prior.path = stored
        (cell / "config.yaml").write_text(OmegaConf.to_yaml(config))
        assert difference(cell, compose("train", words)) is None
    told = difference(cell, compose("train", ["env=digits"]))
    assert told is not None and told.startswith(f"prior.path={a / 'models' / 'prior'} instead of")


def test_a_module_that_is_not_there_says_where_to_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    words = own_reward(tmp_path / "a", CODE, name="elsewhere", controls="{level: 2}")
    monkeypatch.chdir(tmp_path / "a")
    run = train(tmp_path / "a", "run", "trainer.updates=1", *words)
    agent = OmegaConf.load(run / "config.yaml")
    sampled = ["sample", f"run={run}", "control=1", "n=2", "trust=my_elsewhere"]
    assert main(sampled) == 0
    monkeypatch.delitem(sys.modules, "my_elsewhere")
    monkeypatch.chdir(tmp_path / "b")
    fix = "there is no module {} here; run from the folder that has it, or put that folder on "
    fix += "PYTHONPATH"
    capsys.readouterr()
    assert main(sampled) == 2
    told = capsys.readouterr().err.strip()
    assert told.endswith(fix.format("my_elsewhere")) and told.count("\n") == 0
    agent.reward = {"_target_": "my_gone.Reward"}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(agent))
    assert main([*sampled[:-1], "trust=my_gone"]) == 2
    assert fix.format("my_gone") in capsys.readouterr().err
    assert main(["train", *SMALL, "agent._target_=my_other_agents.Mine"]) == 2
    assert fix.format("my_other_agents") in capsys.readouterr().err
