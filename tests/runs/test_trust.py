"""Loading is not running: a saved run builds parts of the project and what the user trusts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from running import SMALL, own_reward, train

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.runs.compose import compose, config_folder, files, groups
from ctrl_rl.runs.trust import check_trusted, own_modules

# What would run, write, read or import something, in a place that is built. OUT is a file.
HOSTILE = [
    {"_target_": "os.system", "command": "touch OUT"},
    {"_target_": "posix.system", "command": "touch OUT"},
    {"_target_": "subprocess.run", "args": ["touch", "OUT"]},
    {"_target_": "subprocess.check_output", "_args_": [["touch", "OUT"]]},
    {"_target_": "torch.utils.collect_env.run", "command": "touch OUT"},
    {"_target_": "builtins.eval", "_args_": ["open('OUT', 'w')"]},
    {"_target_": "builtins.exec", "_args_": ["open('OUT', 'w')"]},
    {"_target_": "builtins.open", "file": "OUT", "mode": "w"},
    {"_target_": "io.open", "file": "OUT", "mode": "w"},
    {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["OUT"]}},
    {"_target_": "pathlib.Path.write_text", "_args_": [{"_target_": "pathlib.Path"}, "x"]},
    {"_target_": "runpy.run_path", "path_name": "SCRIPT"},
    {"_target_": "importlib.import_module", "name": "evil"},
    {"_target_": "evil.Reward"},
    {"_target_": "hydra.utils.get_class", "path": "evil.Reward"},
    {"_target_": "hydra.utils.get_method", "path": "os.system"},
    {"_target_": "hydra.utils.get_object", "path": "evil.Reward"},
    {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system"}},
    {"_target_": "torch.load", "f": "OUT", "weights_only": False},
    {"_target_": "torch.hub.load", "repo_or_dir": "SCRIPT", "source": "local", "model": "x"},
    {"_target_": "torch.save", "obj": 1, "f": "OUT"},
    {"_target_": "numpy.save", "file": "OUT", "arr": 1},
    {"_target_": "joblib.load", "filename": "OUT"},
    {"_target_": "pickle.loads", "data": "x"},
    {"_target_": "shutil.rmtree", "path": "OUT"},
    # The project's own names, by which other code is reached or a file is written.
    {"_target_": "ctrl_rl.rewards.function.import_module", "name": "evil"},
    {"_target_": "ctrl_rl.rewards.jpeg.torch.load", "f": "OUT"},
    {"_target_": "ctrl_rl.runs.folder.os.system", "command": "touch OUT"},
    {"_target_": "ctrl_rl.runs.folder.write_text", "file": "OUT", "text": "x"},
    {"_target_": "ctrl_rl.files.write_text", "file": "OUT", "text": "x"},
    {"_target_": "ctrl_rl.cli.main.main", "arguments": ["train", "run.overwrite=true"]},
    {"_target_": "ctrl_rl.classifiers.fit.run_classifier_fit", "out": "OUT"},
    {"_target_": "ctrl_rl.classifiers.calibration.reliability_diagram", "path": "OUT"},
    {"_target_": "ctrl_rl.classifiers.classifier.Classifier.save", "self": 1, "folder": "OUT"},
    {"_target_": "ctrl_rl.classifiers.fit.Path.touch", "self": "OUT"},
    {"_target_": "ctrl_rl.export.lora.push", "folder": "OUT", "name": "x"},
    {"_target_": "ctrl_rl.rewards.FunctionReward", "function": "os.system", "controls": {}},
    {"_target_": "ctrl_rl.rewards.FunctionReward", "function": "evil.reward", "controls": {}},
    {"_target_": "ctrl_rl.agents.sac.Sac", "objective": "evil.Loss"},
    {"_target_": "ctrl_rl.rewards.PackagedScore", "target": "evil.Reward", "path": "x"},
    {"_target_": ["os.system"]},
    {"_target_": "CTRL_RL.rewards.LinearReward"},
    {"_target_": "ctrl_rl.rewards.nothing_there"},
    {"_target_": ""},
    {"_target_": None},
]
EVIL = "open({out!r}, 'w')\nclass Reward: ...\ndef reward(sample, control): ...\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), "run", "trainer.updates=1")


@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: str(node["_target_"]))
@pytest.mark.parametrize("where", ["reward", "policy.extra", "evaluation.heldout.side"])
def test_other_code_is_refused_before_it_is_imported(finished, tmp_path, monkeypatch, where, node):
    out = tmp_path / "effect"
    (tmp_path / "evil.py").write_text(EVIL.format(out=str(out)))
    monkeypatch.syspath_prepend(tmp_path)
    text = json.dumps(node).replace("OUT", str(out)).replace("SCRIPT", str(tmp_path / "evil.py"))
    config = OmegaConf.load(finished / "config.yaml")
    OmegaConf.update(config, where, json.loads(text), force_add=True, merge=False)
    with pytest.raises(RunError, match="is not a part of ctrl_rl") as refused:
        check_trusted(config, tmp_path / "config.yaml")
    assert where.split(".")[0] in str(refused.value) and "\n" not in str(refused.value)
    assert not out.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "train"])
def test_no_command_runs_a_hostile_run(tmp_path, capsys, command, monkeypatch):
    run = train(tmp_path, "run", "trainer.updates=1")
    out = tmp_path / "effect"
    for module in ("evil", "wandb", "peft_extras"):
        (run / f"{module}.py").write_text(EVIL.format(out=str(out)))
    config = OmegaConf.load(run / "config.yaml")
    config.reward = {"_target_": "evil.Reward"}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    words = {
        "sample": ["run=.", "control=1"],
        "evaluate": ["run=."],
        "export": ["run=.", "out=x"],
        "train": ["resume=."],
    }[command]
    capsys.readouterr()
    monkeypatch.chdir(run)
    assert main([command, *words]) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0 and "evil.Reward" in told and "trust=evil" in told
    assert not out.exists()


def test_python_m_does_not_import_from_the_run_folder(finished):
    # Named like one that is imported, as Python would search the working directory first.
    (finished / "diffusers.py").write_text("print('imported')\nraise SystemExit(7)\n")
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "ctrl_rl", "sample", "run=.", "control=1", "n=1"],
            cwd=finished,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    finally:
        (finished / "diffusers.py").unlink()
    assert ran.returncode == 0 and "imported" not in ran.stdout, ran.stderr


IMPORTERS = {  # modules that import by a name, and from where they have it
    "ctrl_rl/__init__.py",  # names of its own
    "ctrl_rl/learning/pretrain.py",  # diffusers
    "ctrl_rl/rewards/function.py",  # an argument that may be a Callable
    "ctrl_rl/rewards/models/prompt_score.py",  # the same
    "ctrl_rl/runs/arguments.py",  # a config that was checked, or is the user's own
    "ctrl_rl/runs/record.py",  # writes a name and imports nothing
    "ctrl_rl/runs/trust.py",
}


def test_no_other_module_imports_by_a_name():
    root = Path(__file__).parents[2]
    words = re.compile(
        r"import_module|get_class|get_object|get_method|__import__|\bexec\(|\beval\((?!\))"
    )
    found = {
        str(file.relative_to(root))
        for folder in ("ctrl_rl", "envs", "agents")
        for file in (root / folder).rglob("*.py")
        if not {"envs", "agents", "configs"} & {*file.relative_to(root).parts[1:2]}
        and words.search(file.read_text())
    }
    assert found == IMPORTERS


def test_every_shipped_config_is_trusted():
    parts = [group for group in groups() if group not in ("classifier", "dataset", "recipe")]
    for group in parts:
        for name, file in files(group).items():
            config = OmegaConf.load(file)
            for node in _without_interpolations(OmegaConf.to_container(config)):
                check_trusted(OmegaConf.create(node), file)
            assert name
    for words in (["env=gaussian_mean", "agent=sac"], ["env=faces", "agent=h_transform"]):
        config = compose("train", words)
        check_trusted(config, config_folder())
        assert own_modules(config) == []


def _without_interpolations(node):
    """A config before it is composed, without what the user and composing fill in."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if "${" not in str(value)}
        yield json.loads(json.dumps(kept).replace('"???"', "null"))


REWARD = """
import os
from os import system

def upward(sample, control):
    return -(sample[:, 0] - control["level"]).square()

class Inside:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    words = own_reward(tmp_path, REWARD, name="upward", controls="{level: 2}")
    monkeypatch.syspath_prepend(tmp_path)
    return train(tmp_path, "run", "trainer.updates=1", *words)


def test_a_module_of_the_users_is_trusted_for_one_command(own, capsys, monkeypatch):
    sampled = ["sample", f"run={own}", "control=1", "n=2"]
    capsys.readouterr()
    assert main(sampled) == 2 and "add trust=my_upward" in capsys.readouterr().err
    assert main([*sampled, "trust=my_upward"]) == 0
    assert main(sampled) == 2  # remembered nowhere
    assert main([*sampled, "trust=my_up"]) == 2  # the whole name
    assert main([*sampled, "trust=[other, my_upward]"]) == 0
    with pytest.raises(RunError, match="trust=my_upward"):
        load_run(own)
    assert load_run(own, trust=["my_upward"]).sample(1, n=2).shape == (2, 2)
    monkeypatch.setenv("CTRL_RL_TRUST", "other,my_upward")
    assert main(sampled) == 0
    assert load_run(own).sample(1, n=2).shape == (2, 2)
    with pytest.raises(ConfigError, match="not the name of a module"):
        load_run(own, trust=["my upward"])


@pytest.mark.parametrize("name", ["my_upward.system", "my_upward.os.system", "os.system"])
def test_trust_is_in_what_a_module_defines(own, name):
    config = OmegaConf.load(own / "config.yaml")
    config.reward.function = name
    with pytest.raises(RunError, match="is not a part of ctrl_rl"):
        check_trusted(config, own, ["my_upward"])


def test_the_command_that_resumes_names_the_modules(tmp_path, monkeypatch, capsys):
    words = own_reward(tmp_path, REWARD, name="upward", controls="{level: 2}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "ctrl_rl.runs.train.evaluate_into",
        lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    run = tmp_path / "run"
    assert main(["train", *SMALL, *words, f"run.root={tmp_path}", "run.name=run"]) == 130
    assert f"ctrl-rl train resume={run} trust=my_upward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a [1, 2]\nb: [*a, *a]\n", "aliases"),
        ("reward: ${oc.env:HOME}\n", "interpolations"),
        ("reward: {size: ['${oc.env:HOME}']}\n", "interpolations"),
        ("x: " + "[" * 3000 + "]" * 3000, "nested deeper"),
        ("x: '" + "y" * 5_000_000 + "'", "larger than any"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    ],
)
def test_yaml_that_is_no_config(tmp_path, text, told, capsys):
    run = train(tmp_path, "run", "trainer.updates=1")
    (run / "config.yaml").write_text(text)
    capsys.readouterr()
    assert main(["sample", f"run={run}", "control=1"]) == 2
    message = capsys.readouterr().err.strip()
    assert told in message and message.count("\n") == 0
