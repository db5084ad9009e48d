"""Pre-training stops, resumes and is killed without a trace in what it writes."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from kills import everything, run_child
from safetensors.torch import load_file

from ctrl_rl.cli.main import main
from ctrl_rl.data import OfflineDataset
from ctrl_rl.errors import ConfigError, NonFiniteError, RunError
from ctrl_rl.interrupts import Interrupted
from ctrl_rl.learning.pretrain import PretrainPlan, pretrain
from ctrl_rl.marker import locked

UNET = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "dropout": 0.3,  # draws random numbers of its own
}
SCHEDULER = {"prediction_type": "v_prediction", "clip_sample": False}
WORDS = ["pretrain", "prior=digits", "recipe.updates=5", "recipe.batch_size=4"]
FILES = {
    *("recipe.json", "README.md", "model_index.json", "scheduler/scheduler_config.json"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
}


def plan(**changes) -> PretrainPlan:
    settings = {"unet": UNET, "scheduler": SCHEDULER, "updates": 6, "batch_size": 4}
    return PretrainPlan(**{**settings, "weight_decay": 0.1, **changes})


@pytest.fixture(scope="module")
def pictures() -> OfflineDataset:
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = torch.arange(20)
    return OfflineDataset(x=x, labels=rows % 2, num_labels=2, splits={"train": rows})


def stop_at(update: int, number: int = signal.SIGTERM):
    return lambda done, loss: os.kill(os.getpid(), number) if done == update else None


@pytest.mark.parametrize("half", [False, True])
def test_it_stops_and_resumes_bit_for_bit(pictures, tmp_path, half):
    losses: dict[int, float] = {}
    figures = pretrain(pictures, plan(half=half), tmp_path / "whole", report=losses.__setitem__)
    resumed: dict[int, float] = {}
    for update, number in ((2, signal.SIGTERM), (5, signal.SIGINT)):
        torch.manual_seed(update)  # the global state is another process's
        before = torch.random.get_rng_state()

        def report(done, loss, update=update, number=number):
            resumed[done] = loss
            stop_at(update, number)(done, loss)

        with pytest.raises(Interrupted, match=f"stopped after update {update} of 6 and saved"):
            pretrain(pictures, plan(half=half), tmp_path / "part", report=report)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not (tmp_path / "part").exists()
    again = pretrain(pictures, plan(half=half), tmp_path / "part", report=resumed.__setitem__)
    assert resumed == losses and again["loss"] == figures["loss"]
    assert everything(tmp_path / "part") == everything(tmp_path / "whole")
    assert set(everything(tmp_path / "whole")) == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "part"}


def test_the_state_holds_network_average_optimizer_and_generators(pictures, tmp_path):
    with pytest.raises(Interrupted):
        pretrain(pictures, plan(), tmp_path / "out", report=stop_at(2))
    rest = tmp_path / "out.unfinished"
    state = load_file(rest / "000002.safetensors")
    kinds = {name.partition(".")[0] for name in state}
    assert kinds == {"done", "generator", "layers", "network", "average", "optimizer", "losses"}
    assert len(state["losses"]) == 2 and state["losses"].dtype == torch.float64
    assert json.loads((rest / "progress.json").read_text())["settings"]["unet"] == UNET


def test_what_decides_the_result_must_be_the_same(pictures, tmp_path):
    with pytest.raises(Interrupted):
        pretrain(pictures, plan(), tmp_path / "out", report=stop_at(2))
    others = OfflineDataset(
        x=-pictures.x, labels=pictures.labels, num_labels=2, splits=pictures.splits
    )
    for dataset, changes, reason in (
        (pictures, {"learning_rate": 0.1}, r"another learning_rate \(0\.002, now 0\.1\)"),
        (pictures, {"unet": UNET | {"dropout": 0.0}}, "another unet; give the earlier one"),
        (others, {}, "another dataset; give the earlier one"),
    ):
        with pytest.raises(ConfigError, match=reason):
            pretrain(dataset, plan(**changes), tmp_path / "out")
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConfigError, match=r"another threads \(1, now 2\)"):
            pretrain(pictures, plan(), tmp_path / "out")
    finally:
        torch.set_num_threads(1)


def test_a_prior_that_diverged_is_not_resumed(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("ctrl_rl.unfinished.SAVE_EVERY_S", 0.0)
    wild = plan(learning_rate=1e30)
    with pytest.raises(NonFiniteError, match="lower recipe.learning_rate"):
        pretrain(pictures, wild, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_it_replaces_an_earlier_prior_and_no_other_folder(pictures, tmp_path):
    out = tmp_path / "out"
    pretrain(pictures, plan(updates=1), out)
    first = everything(out)
    pretrain(pictures, plan(updates=2), out)
    assert everything(out)["recipe.json"] != first["recipe.json"]
    (out / "vae").mkdir()
    (out / "vae" / "config.json").write_text("mine")
    before = everything(out)

    def computed(done, loss):
        raise AssertionError("computed first")

    with pytest.raises(ConfigError, match="will not write a prior to .*'vae/config.json'"):
        pretrain(pictures, plan(), out, report=computed)
    foreign = tmp_path / "foreign"  # a pipeline of somebody else's
    (foreign / "unet").mkdir(parents=True)
    (foreign / "unet" / "diffusion_pytorch_model.safetensors").write_text("mine")
    for content in (None, "{", "{}", "[]", '{"learning_rate": 1}'):
        if content is not None:
            (foreign / "recipe.json").write_text(content)
        with pytest.raises(ConfigError, match="it has no recipe.json of one"):
            pretrain(pictures, plan(), foreign, report=computed)
    with pytest.raises(RunError, match="cannot write to"):
        pretrain(pictures, plan(), out / "recipe.json" / "deep", report=computed)
    assert everything(out) == before


def test_the_shipped_priors_may_be_made_again():
    from ctrl_rl.assets import resolve
    from ctrl_rl.learning.pretrain import PRIOR

    for name in ("digits", "faces"):
        PRIOR.check_replaceable(resolve(f"package://{name}/prior"))


def test_files_are_readable_by_others(pictures, tmp_path):
    pretrain(pictures, plan(updates=1), tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").rglob("*.*")}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_is_resumed_by_the_same_command(tmp_path, monkeypatch, number):
    monkeypatch.setattr("ctrl_rl.unfinished.SAVE_EVERY_S", 0.0)
    whole = [*WORDS, f"out={tmp_path / 'whole'}"]
    part = [*WORDS, f"out={tmp_path / 'part'}"]
    assert main(whole) == 0
    died = run_child(part, number, at_write=14)  # while the third update is saved
    if number == signal.SIGKILL:
        assert died.code == -number
    else:
        assert died.code == 130
        last = died.told.strip().splitlines()[-1]
        assert last == (
            "ctrl-rl: stopped after update 4 of 5 and saved; re-run the command to resume"
        )
    assert main(part) == 0
    assert everything(tmp_path / "part") == everything(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "part"}


def test_a_second_command_is_refused_by_name(tmp_path, capsys):
    with locked(tmp_path / "out.unfinished"):
        assert main([*WORDS, f"out={tmp_path / 'out'}"]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{tmp_path / 'out.unfinished'} is in use by process {os.getpid()}" in told
    assert not (tmp_path / "out").exists()


def test_a_folder_must_be_named(capsys):
    assert main([*WORDS, "out=null"]) == 2
    assert "out=null must be text" in capsys.readouterr().err


def test_a_relative_or_home_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pretrain(pictures, plan(updates=1), Path("priors/mine"))
    pretrain(pictures, plan(updates=1), Path("~/mine"))
    assert everything(tmp_path / "priors" / "mine") == everything(tmp_path / "home" / "mine")
