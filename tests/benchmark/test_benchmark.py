"""The grid through the command line: done, skipped, resumed, failed, refused, reported."""

import csv
import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import choices
from omegaconf import OmegaConf
from running import SMALL, contents, summary, train

from ctrl_rl import load_run
from ctrl_rl.benchmark import gallery
from ctrl_rl.benchmark.grid import build_grid
from ctrl_rl.benchmark.statistics import interquartile_mean
from ctrl_rl.cli.main import main
from ctrl_rl.runs.compose import compose

QUICK = ["kernel.num_steps=3", "trainer.updates=30"]
OVERRIDES = [*(word for word in SMALL if word != "env=gaussian"), *QUICK]
ONE_UPDATE = "denoiser_calls=112"  # of 16 episodes: 3 steps and the read-out, 3 of the policy
CELLS = [f"{agent}-s{seed}" for agent in ("ctrl", "reinforce") for seed in (1, 2)]


def words(folder, *more):
    return [
        "benchmark",
        "agents=[ctrl,reinforce]",
        "tasks=[gaussian]",
        "seeds=[1,2]",
        "denoiser_calls=null",
        f"overrides={OVERRIDES}",
        f"root={folder / 'runs'}",
        f"out={folder / 'report'}",
        *more,
    ]


def rows(folder):
    with (folder / "report" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def cell(folder, name):
    return folder / "runs" / "gaussian" / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(words(folder)) == 0
    return folder


def test_a_cell_is_an_ordinary_run(whole, tmp_path):
    alone = train(tmp_path, "alone", *QUICK, "seed=2")
    assert contents(cell(whole, "ctrl-s2")) == contents(alone)
    of_cell, expected = summary(cell(whole, "ctrl-s2")), summary(alone)
    assert {**of_cell, "wall_s": 0} == {**expected, "wall_s": 0}
    assert load_run(cell(whole, "reinforce-s1")).sample(control=1, n=3).shape == (3, 2)


def test_report_holds_the_numbers_of_the_cells(whole):
    table = rows(whole)
    assert [f"{row['agent']}-s{row['seed']}" for row in table] == CELLS
    gaps = {}
    for row, name in zip(table, CELLS, strict=True):
        figures = summary(cell(whole, name))
        assert row["state"] == "finished" and row["error"] == ""
        assert float(row["gap_nats"]) == figures["gap_nats"]
        assert int(row["denoiser_calls"]) == figures["denoiser_calls"]
        gaps.setdefault(row["agent"], []).append(figures["gap_nats"])
    report = (whole / "report" / "report.md").read_text()
    ranked = sorted(gaps, key=lambda agent: interquartile_mean(gaps[agent]))
    for place, agent in enumerate(ranked, start=1):
        assert f"| {place} | `{agent}` | {interquartile_mean(gaps[agent]):.3f} | [" in report
    prior = summary(cell(whole, CELLS[0]))["prior"]["gap_nats"]
    assert f"|  | prior | {prior:.3f} |" in report
    pictures = {file.name for file in (whole / "report").glob("*.png")}
    assert pictures == {f"{name}-gaussian.png" for name in ("gap", "pareto", "samples")}
    assert all(f"]({picture})" in report for picture in pictures)


def test_gallery_shows_the_best_seed_of_every_agent(whole, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(gallery, "draw_table", lambda path, **given: drawn.update(given))
    assert main(words(whole, f"out={tmp_path}")) == 0
    gaps = {name: summary(cell(whole, name))["gap_nats"] for name in CELLS}
    best = {
        agent: min(f"{agent}-s1", f"{agent}-s2", key=gaps.get) for agent in ("ctrl", "reinforce")
    }
    ranked = [
        line.split("`")[1]
        for line in (tmp_path / "report.md").read_text().splitlines()
        if line.startswith("| 1 |") or line.startswith("| 2 |")
    ]
    assert list(drawn["rows"]) == [f"{a}, {gaps[best[a]]:.3g}" for a in ranked] + ["prior"]
    for agent, row in zip(ranked, drawn["rows"].values(), strict=False):
        run = load_run(cell(whole, best[agent]))
        for label, sample in enumerate(row):
            assert torch.equal(sample, run.sample(label, n=drawn["count"], seed=label))
    assert [len(row) for row in drawn["rows"].values()] == [len(drawn["headings"])] * 3


def test_finished_cells_are_skipped(whole, capsys):
    written = [cell(whole, name).joinpath("summary.json").stat().st_mtime_ns for name in CELLS]
    assert main(words(whole)) == 0
    assert "4 cells, 4 finished" in capsys.readouterr().err
    again = [cell(whole, name).joinpath("summary.json").stat().st_mtime_ns for name in CELLS]
    assert again == written


def test_killed_and_called_again_is_uninterrupted(whole, tmp_path, capsys):
    command = [sys.executable, "-m", "ctrl_rl", *words(tmp_path, "seeds=[1]")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    file = cell(tmp_path, "reinforce-s1") / "metrics.jsonl"
    lines = 0
    while lines < 8 and process.poll() is None:
        lines = file.read_bytes().count(b"\n") if file.is_file() else 0
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(words(tmp_path, "seeds=[1]")) == 0
    assert "2 cells, 1 finished, 1 interrupted" in capsys.readouterr().err
    for name in ("ctrl-s1", "reinforce-s1"):
        assert contents(cell(tmp_path, name)) == contents(cell(whole, name))
        found, expected = summary(cell(tmp_path, name)), summary(cell(whole, name))
        assert {**found, "wall_s": 0} == {**expected, "wall_s": 0}


def test_cells_of_other_settings_are_refused_by_name(tmp_path, capsys):
    once = [ONE_UPDATE, "agents=[ctrl]", "seeds=[1]"]
    assert main(words(tmp_path, *once)) == 0
    before = contents(cell(tmp_path, "ctrl-s1"))
    capsys.readouterr()
    other = [*once, "+settings.ctrl=['trainer.learning_rate.network=0.02']"]
    assert main(words(tmp_path, *other)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "redo=true" in told
    assert "gaussian/ctrl-s1 was made with trainer.learning_rate.network=0.01 instead of" in told
    assert contents(cell(tmp_path, "ctrl-s1")) == before
    assert main(words(tmp_path, *other, "redo=true")) == 0
    assert contents(cell(tmp_path, "ctrl-s1")) != before


def test_cells_from_before_a_group_existed_still_count(tmp_path, capsys):
    once = [ONE_UPDATE, "agents=[ctrl]", "seeds=[1]"]
    assert main(words(tmp_path, *once)) == 0
    before, file = contents(cell(tmp_path, "ctrl-s1")), cell(tmp_path, "ctrl-s1") / "config.yaml"
    older = OmegaConf.load(file)
    del older.choices.guidance, older.trainer.learning_rate.guidance
    OmegaConf.save(older, file)
    assert main(words(tmp_path, *once)) == 0
    assert contents(cell(tmp_path, "ctrl-s1")) == before
    capsys.readouterr()
    other = ["+settings.ctrl=[guidance=reward]"]
    assert main(words(tmp_path, *once, *other)) == 2
    assert "guidance" in capsys.readouterr().err


REWARDS = """
import torch


def poisoned(sample, control):
    return torch.where(control["side"] == 1, torch.nan, sample[:, 0])


def broken(sample, control):
    return sample[:, 0] + control["sdie"]


def opaque(sample, control):
    return sample[:, 0].detach() * (1 - 2 * control["side"])
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "benchmark_rewards.py").write_text(REWARDS)
    (tmp_path / "mine" / "reward").mkdir(parents=True)
    for name in ("poisoned", "broken", "opaque"):
        (tmp_path / "mine" / "reward" / f"{name}.yaml").write_text(
            f"_target_: ctrl_rl.rewards.FunctionReward\nfunction: benchmark_rewards.{name}\n"
            f"controls: {{side: 2}}\ndifferentiable: {str(name != 'opaque').lower()}\n"
        )
    return f"--config-dir={tmp_path / 'mine'}"


FAILURES = {  # agent: (what its reward is, what is recorded, whether it is a bug)
    "ctrl": ("opaque", "agent=ctrl differentiates the reward, and reward=opaque is not", False),
    "tb": ("poisoned", "the reward is nan for side=1", False),
    "vargrad": ("broken", "KeyError: 'sdie'", True),
}


def test_failing_cells_are_recorded_and_not_fatal(rewards, tmp_path, capsys):
    few = ["agents=[ctrl,reinforce,tb,vargrad]", "seeds=[1]", ONE_UPDATE, rewards]
    bad = [f"+settings.{agent}=['reward={FAILURES[agent][0]}']" for agent in FAILURES]
    assert main(words(tmp_path, *few, *bad)) == 0
    report = (tmp_path / "report" / "report.md").read_text()
    states = {row["agent"]: (row["state"], row["error"]) for row in rows(tmp_path)}
    assert states.pop("reinforce") == ("finished", "")
    for agent, (_, reason, is_bug) in FAILURES.items():
        failure = json.loads((cell(tmp_path, f"{agent}-s1") / "failure.json").read_text())
        assert reason in failure["error"] and "\n" not in failure["error"]
        assert (failure["traceback"] is not None) == is_bug
        assert states[agent] == ("failed", failure["error"])
        assert f"- `gaussian/{agent}-s1` is failed. {failure['error']}" in report
    capsys.readouterr()
    # What failed is tried again; it has no result to protect, so other settings are simply taken.
    assert main(words(tmp_path, *few, *bad[1:])) == 0
    assert "4 cells, 1 finished, 3 failed" in capsys.readouterr().err
    assert [row["state"] for row in rows(tmp_path)] == ["finished"] * 2 + ["failed"] * 2
    assert not (cell(tmp_path, "ctrl-s1") / "failure.json").exists()
    assert summary(cell(tmp_path, "ctrl-s1"))["steps"] == 1


def test_no_finished_cell_is_an_error(tmp_path, capsys):
    few = ["agents=[ctrl]", "seeds=[1]"]
    assert main(words(tmp_path, *few, "denoiser_calls=3")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("ctrl-rl: none of 1 cells is finished; gaussian/ctrl-s1: trainer.denois")


def test_a_failing_launcher_loses_no_finished_cell(whole, tmp_path, monkeypatch, capsys):
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    def die(*arguments, **named):
        raise OSError("node lost")

    with monkeypatch.context() as patch:
        patch.setattr(BasicLauncher, "launch", die)
        few = [f"root={whole / 'runs'}", f"out={tmp_path / 'report'}", "seeds=[1,3]"]
        assert main(words(tmp_path, *few)) == 2
    assert "the launcher failed: OSError: node lost" in capsys.readouterr().err
    assert [row["state"] for row in rows(tmp_path)] == ["finished", "new"] * 2


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is None
    or importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="pip install hydra-joblib-launcher",
)
def test_in_parallel_is_one_after_the_other(whole, tmp_path):
    parallel = ["launcher=joblib", "+launcher_settings.n_jobs=2", "seeds=[2]"]
    assert main(words(tmp_path, *parallel)) == 0
    for name in ("ctrl-s2", "reinforce-s2"):
        assert contents(cell(tmp_path, name)) == contents(cell(whole, name))


REFUSED = {
    "agents=[ctlr]": "agents names the unknown agent 'ctlr'; did you mean 'ctrl'",
    "agents=[]": "agents=[] leaves nothing to do",
    "agents=ctrl": "agents=ctrl must be a list",
    "tasks=[gausian]": "did you mean 'gaussian'",
    "seeds=[a]": "seeds=['a'] must be a list",
    "seeds=[1,1]": "seeds has 1 twice",
    "denoiser_calls=abc": "denoiser_calls=abc must be a whole number or null",
    "launcher=jobli": "did you mean 'joblib'",
    "launcher=rq": "unknown launcher 'rq'",
    "+launcher_settings.n_jobs=2": "launcher=basic takes no launcher_settings.n_jobs",
    "launcher_settings={n_jobs: 2}": "write +launcher_settings.NAME=",
    "launcher_settings.n_jobs=2": "write +launcher_settings.n_jobs=",
    "overrides=['trainer.updtes=3']": "ctrl on gaussian: unknown key 'trainer.updtes'; did you me",
    "overrides=['seed=3']": "overrides has seed=3, which the grid decides",
    "overrides=['run.name=x']": "overrides has run.name=x, which the grid decides",
    "+settings.ctlr=[]": "settings names the unknown agent 'ctlr'; did you mean 'ctrl'",
    "settings=tuend": "unknown settings 'tuend'",
    "agnets=[ctrl]": "did you mean 'agents'",
}


@pytest.mark.parametrize("given", REFUSED)
def test_refused_before_any_compute(given, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given_key = given.partition("=")[0]
    base = [word for word in words(tmp_path) if not word.startswith(f"{given_key}=")]
    assert main([*base, given]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.strip().count("\n") == 0
    assert REFUSED[given] in told.err
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_that_is_not_installed_is_named_with_its_package(tmp_path, capsys, monkeypatch):
    from hydra.core.config_store import ConfigStore

    monkeypatch.setattr(ConfigStore, "list", lambda store, path: ["basic.yaml"])
    assert main(words(tmp_path, "launcher=submitit_slurm")) == 2
    assert "pip install hydra-submitit-launcher" in capsys.readouterr().err


def test_every_agent_by_default():
    grid = build_grid(compose("benchmark", ["tasks=[gaussian]", "seeds=[7]"]))
    assert [made.agent for made in grid.cells] == choices("agent")
    assert {made.config.trainer.denoiser_calls for made in grid.cells} == {1000000}
