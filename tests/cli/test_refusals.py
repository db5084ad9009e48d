"""Bad input: one line that names the fix, exit code 2, no run folder, no traceback."""

import pytest
import torch
from running import SMALL, train

from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError
from ctrl_rl.runs.compose import compose

REFUSED = {
    "agent=ctlr": "did you mean 'ctrl'",
    "env=gausian": "did you mean 'gaussian'",
    "prior=digit": "did you mean 'digits'",
    "kernel=ddmp": "did you mean 'ddpm'",
    "reward=liner": "did you mean 'linear'",
    "control_law=balance": "did you mean 'balanced'",
    "policy=drft": "did you mean 'drift'",
    "trainer=defualt": "did you mean 'default'",
    "evaluation=defualt": "did you mean 'default'",
    "logger=cvs": "did you mean 'csv'",
    "experiment=dmeo": "did you mean 'demo'",
    "agent=null": "unknown agent 'null'",
    "agent=[a,b]": "unknown agent",
    "trainer.updtes=3": "did you mean 'trainer.updates'",
    "trainer.learning_rate.netwrk=3": "did you mean 'trainer.learning_rate.network'",
    "agnet=ctrl": "did you mean 'agent'",
    "sed=3": "did you mean 'seed'",
    "+evaluation.sede=3": "did you mean 'evaluation.seed'",
    "+agent.truncaton=3": "did you mean 'agent.truncation'",
    "agent": "write key=value",
    "env.guidance_strength=0": "must be > 0",
    "env.guidance_strength=-1": "must be > 0",
    "env.guidance_strength=abc": "must be a number",
    "env.guidance_strength=null": "must be a number",
    "kernel.num_steps=0": "use 1 to",
    "kernel.num_steps=1.5": "must be a whole number",
    "kernel=ddim kernel.eta=0": "kernel.eta",
    "trainer.updates=abc": "trainer.updates=abc must be a whole number",
    "trainer.updates=0": "must be 1 or more",
    "trainer.updates=1.5": "must be a whole number",
    "trainer.updates=true": "must be a whole number",
    "trainer.denoiser_calls=abc": "must be a whole number or null",
    "trainer.denoiser_calls=0": "must be 1 or more",
    "trainer.denoiser_calls=271": "does not pay for one update, which takes 272",
    "trainer.batch_size=0": "must be 1 or more",
    "trainer.warmup=-1": "must be 0 or more",
    "trainer.weight_decay=-1": "must be 0 or more",
    "trainer.learning_rate.network=-1": "must be > 0",
    "trainer.learning_rate.network=abc": "a number",
    "trainer.learning_rate=1": "must be a mapping",
    "~trainer.learning_rate.embedding": "no trainer.learning_rate.embedding",
    "trainer.betas=[0.9]": "must be a list",
    "trainer.betas=[0.9,2]": "must be in [0, 1)",
    "trainer.betas=abc": "must be a list",
    "trainer.ema_decay=2": "or use null",
    "trainer.max_grad_norm=0": "or null",
    "trainer.schedule=cos": "did you mean 'cosine'",
    "seed=abc": "seed=abc must be a whole number",
    "seed=-1": "0 or more",
    "seed=1,2": "give one",
    "control_law=fixed control_law.label=99": "use whole labels 0 to 2",
    "control_law=fixed control_law.label=abc": "unknown label 'abc' of control direction",
    "control_law=fixed": "add control_law.label=",
    "control_law=weighted control_law.probabilities=3": "must be a list",
    "prior=diffusers": "add prior.path=",
    "prior=diffusers prior.path=/nowhere": "/nowhere",
    "policy.width=abc": "must be a whole number",
    "policy=fine_tuned": "use policy=side_network",
    "device=cdua": "try device=cpu",
    "run=foo": "set run.KEY=",
    "run.name=../x": "run.root",
    "run.overwrite=maybe": "true or false",
    "run.root=null": "must be text",
    "run.name=${nope}": "nope",
    "run.name=[a": "close every bracket",
    "trainer.updates={": "close every bracket",
    "~seed": "seed",
    "reward.weights=[[1,2,3]]": "do not fit each other",
    "agent.truncation=0": "agent.truncation",
    "agent.truncation=all": "uniform",
    "agent._target_=nope.Agent": "nope",
    "evaluation.seed=abc": "must be a whole number",
    "evaluation.prior_samples=1": "2 or more",
    "evaluation.heldout=3": "evaluation.heldout",
    "logger=wandb": "pip install wandb",
    "--config-dir=nowhere": "nowhere is not a folder",
    "--confg": "unknown option --confg",
    "resume=nope": "drop env=gaussian",
}
if not torch.cuda.is_available():
    REFUSED["device=cuda"] = "try device=cpu"


def refused(words, capsys):
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("ctrl-rl: ") and told.err.strip().count("\n") == 0, told.err
    return told.err


@pytest.mark.parametrize("given", REFUSED)
def test_train_refuses(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "ctrl_rl.runs.loggers.find_spec", lambda name: None
    )  # whether wandb is here
    told = refused(["train", *SMALL, *given.split()], capsys)
    assert REFUSED[given] in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("trian env=gaussian", "did you mean 'train'"),
        ("list agents", "list takes no"),
        ("list --config-dir nowhere", "nowhere is not a folder"),
        ("evaluate", "run=runs/demo"),
        ("evaluate run=nope", "runs/mine"),
        ("evaluate run=mine", "did you mean 'runs/mine'"),
        ("evaluate run=runs/mien", "did you mean 'runs/mine'"),
        ("evaluate run=runs/mine evaluation.sede=3", "did you mean 'evaluation.seed'"),
        ("evaluate run=runs/mine evaluation.seed=abc", "must be a whole number"),
        ("evaluate run=runs/mine evaluation.seed=[", "close every bracket"),
        ("evaluate run=runs/mine rnu=3", "did you mean 'run'"),
        ("evaluate run=runs/mine checkpoint=3", "it has [0, 5]"),
        ("evaluate run=runs/mine checkpoint=abc", "not a whole number"),
        ("sample run=nope control=1", "runs/mine"),
        ("sample control=1", "run=runs/demo"),
        ("sample run=runs/mine", "control.direction="),
        ("sample run=runs/mine control=99", "0 to 2"),
        ("sample run=runs/mine control=-1", "0 to 2"),
        ("sample run=runs/mine control=abc", "unknown label 'abc' of control direction"),
        ("sample run=runs/mine control.digit=1", "direction"),
        ("sample run=runs/mine control=1 control.direction=1", "not both"),
        ("sample run=runs/mine contrl=1", "did you mean 'control'"),
        ("sample run=runs/mine control=1 n=0", "1 or more"),
        ("sample run=runs/mine control=1 strength=-1", ">= 0"),
        ("sample run=runs/mine control=1 strength=inf", ">= 0"),
        ("sample run=runs/mine control=1 seed=-1", "0 or more"),
        ("sample run=runs/mine control=1 out=/proc/none", "/proc/none"),
        ("train resume=nope", "runs/mine"),
        ("train resume=runs/mine seed=3", "drop seed=3"),
        ("train checkpoint=3", "resume=runs/"),
        ("pretrain dataset=digit", "did you mean 'digits'"),
        ("pretrain agent=ctrl", "unknown key 'agent'"),
        ("classifier classifier=digts", "did you mean 'digits'"),
        ("classifier dataset=npz", "add dataset.path="),
        ("classifier classifier.epochs=0", "epochs=0"),
    ],
)
def test_other_commands_refuse(words, hint, tmp_path, monkeypatch, capsys, mine):
    monkeypatch.chdir(mine)
    assert hint in refused(words.split(), capsys)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    train(folder / "runs", "mine", "trainer.updates=5")
    return folder


def test_broken_plug_in_yaml(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "mine.yaml").write_text("_target_: [\n")
    refused(["train", *SMALL, f"--config-dir={tmp_path}", "agent=mine"], capsys)


def test_reward_without_gradient(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, says, body in (
        ("honest", "false", "sample[:, 0]"),
        ("broken", "true", "sample[:, 0].detach()"),
    ):
        (tmp_path / f"{name}_reward.py").write_text(f"def f(sample, control):\n    return {body}\n")
        (tmp_path / "reward").mkdir(exist_ok=True)
        (tmp_path / "reward" / f"{name}.yaml").write_text(
            "_target_: ctrl_rl.rewards.FunctionReward\n"
            f"function: {name}_reward.f\ncontrols: {{side: 2}}\ndifferentiable: {says}\n"
        )
        words = ["train", *SMALL, f"--config-dir={tmp_path}", f"reward={name}"]
        told = refused(words, capsys)
        assert "differentiable" in told
        assert says == "true" or ("agent=ctrl" in told and "reward=honest" in told)
    assert not (tmp_path / "runs").exists()


def test_an_override_that_stands_in_a_file_is_refused_by_the_files_name(tmp_path):
    """Without `# @package _global_` an experiment's words are looked for under `experiment`."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("defaults:\n  - override /env: digits\n")
    with pytest.raises(ConfigError, match=r"experiment/mine.*Could not override"):
        compose("train", ["experiment=mine"], [str(tmp_path)])
