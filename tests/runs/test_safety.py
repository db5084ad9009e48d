"""Run folders in a stranger's hands: what is deleted, locked, written whole and taken back."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import SMALL, contents, interrupt, metrics, summary, train
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.errors import ConfigError, RunError, RunInUseError
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.loggers import WandbLog


def again(run: Path, *words: str) -> int:
    return main(["train", *SMALL, f"run.root={run.parent}", f"run.name={run.name}", *words])


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("ctrl-rl: ")
    return told[-1]


# What is deleted


def test_a_foreign_folder_with_a_config_is_never_emptied(tmp_path, capsys):
    foreign = tmp_path / "thesis"
    (foreign / "data").mkdir(parents=True)
    for name in ("config.yaml", "thesis.tex", "data/a.csv"):
        (foreign / name).write_text("mine")
    before = {file: file.read_bytes() for file in foreign.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert again(foreign, "run.overwrite=true") == 2
    assert "does not carry the mark of a run" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in foreign.rglob("*") if file.is_file()} == before
    words = [f"run.root={tmp_path}", "run.name=thesis", "run.overwrite=true"]
    assert main(["evaluate", "method=prior", "env=gaussian", *words]) == 2
    assert {file: file.read_bytes() for file in foreign.rglob("*") if file.is_file()} == before


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run = train(tmp_path, "run", "logger=csv", "trainer.updates=6")
    assert main(["sample", f"run={run}", "control=1", "n=2"]) == 0
    mine = ["notes.md", "checkpoints/mine.txt", "log/scalars/mine.txt", "plots/a.png", "sample.png"]
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "000005").mkdir(parents=True)
    (elsewhere / "000005" / "summary.json").write_text("mine")
    (run / "evaluations").symlink_to(elsewhere)
    assert again(run, "run.overwrite=true", "trainer.updates=2") == 0
    assert all((run / name).read_text() == "mine" for name in mine)
    assert (elsewhere / "000005" / "summary.json").read_text() == "mine"
    left = {file.name for file in (run / "log" / "scalars").iterdir()}
    assert left == {"mine.txt"} and not list(run.glob("sample-*"))
    assert [line["update"] for line in metrics(run)] == [1, 2]


def test_a_benchmark_deletes_no_folder_in_its_way(tmp_path, capsys):
    foreign = tmp_path / "cells" / "gaussian" / "ctrl-s1"
    foreign.mkdir(parents=True)
    (foreign / "failure.json.txt").write_text("mine")
    words = ["agents=[ctrl]", "tasks=[gaussian]", "seeds=[1]", f"root={tmp_path / 'cells'}"]
    told = refused(["benchmark", *words, f"out={tmp_path / 'out'}"], capsys)
    assert str(foreign) in told and "is no run" in told
    assert (foreign / "failure.json.txt").read_text() == "mine"


# Permissions


def test_a_run_is_readable_by_others(tmp_path):
    run = train(tmp_path)
    previous = os.umask(0)
    os.umask(previous)
    for file in run.rglob("*"):
        if file.is_file():
            assert file.stat().st_mode & 0o777 == 0o666 & ~previous, file


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    run = train(tmp_path)

    def denied(file):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("ctrl_rl.runs.checkpoints._hash", denied)
    with pytest.raises(RunError, match="may not be read") as told:
        load_run(run)
    assert "damaged" not in str(told.value) and "overwrite" not in str(told.value)


# Two processes

HOLD = """
import sys, time
from pathlib import Path
from ctrl_rl.marker import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_by_name_until_its_process_is_dead(tmp_path, capsys):
    run = train(tmp_path, "run", "trainer.updates=6")
    before = contents(run)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as other:
        assert other.stdout.readline() == b"held\n"
        for words in (
            ["train", f"resume={run}"],
            ["evaluate", f"run={run}"],
            ["train", *SMALL, f"run.root={tmp_path}", "run.name=run", "run.overwrite=true"],
        ):
            told = refused(words, capsys)
            assert f"in use by process {other.pid}" in told and str(run) in told
        assert load_run(run).sample(1, n=1).shape == (1, 2)  # reading needs no lock
        other.kill()
    assert contents(run) == before
    assert main(["train", f"resume={run}", "checkpoint=5"]) == 0  # a dead one's lock is none
    assert contents(run) == before


def test_a_benchmark_leaves_a_cell_in_use_alone(tmp_path, capsys):
    words = ["agents=[ctrl]", "tasks=[gaussian]", "seeds=[1]", f"root={tmp_path / 'cells'}"]
    cell = tmp_path / "cells" / "gaussian" / "ctrl-s1"
    with Run(cell).locked():
        (cell / "mine").write_text("another process's")
        with pytest.raises(RunInUseError, match="in use by"), Run(cell).locked():
            pass
        (cell / "mine").unlink()
        assert main(["benchmark", *words, f"out={tmp_path / 'out'}"]) == 2  # nothing to report
        assert "left alone" in capsys.readouterr().err
        assert not (cell / "failure.json").exists()


# Summary, weights and logs of one update


def test_resuming_at_an_earlier_checkpoint_removes_later_results(tmp_path, monkeypatch):
    run = train(tmp_path)
    assert main(["evaluate", f"run={run}", "checkpoint=10"]) == 0
    assert main(["evaluate", f"run={run}", "checkpoint=5"]) == 0
    assert summary(run)["steps"] == 12

    def killed(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("ctrl_rl.runs.train._train", killed)
    assert main(["train", f"resume={run}", "checkpoint=5"]) == 130
    assert not (run / "summary.json").exists() and not (run / "samples.png").exists()
    assert summary(run / "evaluations" / "000005")["steps"] == 5  # of what is still there
    assert not (run / "evaluations" / "000010" / "summary.json").exists()
    assert Run.open(run).checkpoints() == [5]


def test_csv_logs_go_back_to_the_checkpoint(tmp_path):
    run = train(tmp_path, "run", "logger=csv")
    file = run / "log" / "scalars" / "reward.csv"
    whole = file.read_text()
    assert len(whole.splitlines()) == 12
    file.write_text(whole + "13,0.")  # killed in a line
    assert main(["train", f"resume={run}", "checkpoint=5"]) == 0
    assert file.read_text() == whole


def test_tensorboard_shows_every_update_once(tmp_path):
    run = train(tmp_path, "run", "logger=tensorboard")
    shown = EventAccumulator(str(run / "log")).Reload().Scalars("reward")
    assert main(["train", f"resume={run}", "checkpoint=5"]) == 0
    after = EventAccumulator(str(run / "log")).Reload().Scalars("reward")
    assert [each.step for each in after] == list(range(1, 13))
    assert [each.value for each in after] == [each.value for each in shown]


def test_a_wandb_run_is_resumed_under_its_id(tmp_path, monkeypatch):
    given = []

    class Recorded:
        def __init__(self, **named):
            given.append(named)

        def log_scalar(self, name, value, step=None):
            pass

    monkeypatch.setattr("ctrl_rl.runs.loggers.find_spec", lambda name: name == "wandb")
    monkeypatch.setattr("torchrl.record.WandbLogger", Recorded)
    run = train(tmp_path, "run", "logger=wandb", "+logger.tags=[a]")
    assert main(["train", f"resume={run}", "checkpoint=5"]) == 0
    first, second = given
    assert first == second and first["id"] == Run.open(run).id and first["tags"] == ["a"]
    assert first["exp_name"] == "run" and first["project"] == "ctrl_rl"
    monkeypatch.setattr("ctrl_rl.runs.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        WandbLog(project="x")


# Disks that are full, folders that cannot be written, files that were edited


@pytest.mark.parametrize("stands", ["policy.safetensors", "state.json"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, capsys, stands):
    whole = contents(train(tmp_path, "whole"))
    for name in ("write_tensors", "write_text"):
        write = getattr(__import__("ctrl_rl.runs.checkpoints", fromlist=[name]), name)

        def full(file, content, write=write):
            write(file, content)
            if file.name == stands and "000010" in str(file):
                file.write_bytes(file.read_bytes()[:10])
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(f"ctrl_rl.runs.checkpoints.{name}", full)
    capsys.readouterr()
    run = tmp_path / "run"
    assert again(run) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left" in told and f"ctrl-rl train resume={run}" in told
    assert Run.open(run).checkpoints() == [0, 5] and not list(run.rglob("*.partial"))
    monkeypatch.undo()
    assert main(["train", f"resume={run}"]) == 0
    assert contents(run) == whole


@pytest.mark.parametrize("root", ["file/runs", "/proc/runs"])
def test_a_root_that_cannot_be_written_is_found_before_any_compute(
    tmp_path, monkeypatch, capsys, root
):
    (tmp_path / "file").write_text("")

    def computed(*given):
        raise AssertionError("computed first")

    monkeypatch.setattr("ctrl_rl.runs.build.build_process", computed)
    told = refused(["train", "env=gaussian", f"run.root={tmp_path / root}"], capsys)
    assert "cannot write to" in told or "Not a directory" in told


def test_a_folder_that_is_deleted_meanwhile(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    log = Run.log

    def deleted(self, figures):
        if figures["update"] == 3:
            shutil.rmtree(self.path)
        log(self, figures)

    monkeypatch.setattr(Run, "log", deleted)
    capsys.readouterr()
    assert again(run) == 2
    assert "update 3 cannot be written" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("text", ["", '{"steps": 12', "[]", "null", "\x00"])
def test_a_damaged_summary_is_one_line(tmp_path, capsys, text):
    run = train(tmp_path, "run", "trainer.updates=1")
    (run / "summary.json").write_text(text)
    with pytest.raises(RunError, match="ctrl-rl evaluate run="):
        load_run(run).summary  # noqa: B018
    assert load_run(run).sample(1, n=1).shape == (1, 2)
    assert main(["evaluate", f"run={run}"]) == 0
    assert load_run(run).summary["steps"] == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state["counters"].pop("prior"),
        lambda state: state["counters"].update(wall_s="long"),
        lambda state: state.update(update=3),
        lambda state: state.pop("sha256"),
        lambda state: state["counters"].update(prior=7),
        lambda state: state.update(made_by={"agent": "ppo"}),
    ],
)
def test_an_edited_state_is_damage(tmp_path, capsys, edit):
    run = train(tmp_path, "run", "trainer.updates=6")
    file = run / "checkpoints" / "000006" / "state.json"
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))
    assert "add checkpoint=5" in refused(["train", f"resume={run}"], capsys)
    assert main(["train", f"resume={run}", "checkpoint=5"]) == 0


def test_metrics_that_are_gone_are_not_begun_anew(tmp_path, capsys):
    run = train(tmp_path)
    interrupt(run)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4]))
    assert "has 4 lines and the checkpoint is of update 10" in refused(
        ["train", f"resume={run}"], capsys
    )


# Another run's checkpoint


def rehash(folder: Path) -> None:
    """Let a checkpoint that was changed look whole."""
    from ctrl_rl.runs import checkpoints

    state = json.loads((folder / "state.json").read_text())
    state["sha256"] = {name: checkpoints._hash(folder / name) for name in state["sha256"]}
    state.pop("state_sha256")
    (folder / "state.json").write_text(json.dumps(state))


def test_another_agents_checkpoint_is_refused(tmp_path, capsys):
    run = train(tmp_path, "run", "trainer.updates=6")
    other = train(tmp_path, "other", "trainer.updates=6", "agent=reinforce")
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    told = refused(["train", f"resume={run}"], capsys)
    assert "is of agent reinforce, and this run's is ctrl" in told
    assert "of agent reinforce" in refused(["sample", f"run={run}", "control=1"], capsys)


@pytest.mark.parametrize("kind", ["without", "other"])
def test_a_checkpoint_without_its_optimizer_state_is_refused(tmp_path, capsys, kind):
    run = train(tmp_path, "run", "trainer.updates=6")
    folder = run / "checkpoints" / "000006"
    training = load_file(folder / "training.safetensors")
    ours = {name for name in training if name.startswith("optimizer.")}
    assert ours
    for name in ours:
        if kind == "without":
            training.pop(name)
        elif training[name].ndim:
            training[name] = torch.zeros(3, 5, 7)
    save_file(training, folder / "training.safetensors")
    rehash(folder)
    told = refused(["train", f"resume={run}"], capsys)
    assert "the optimizer's state is" in told


# One process


def test_one_of_several_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = refused(["train", *SMALL, f"run.root={tmp_path}"], capsys)
    assert "WORLD_SIZE=2" in told and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(tmp_path, "run", "trainer.updates=1")
