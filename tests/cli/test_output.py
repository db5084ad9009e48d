"""What a run prints: lines in a file, bars in a terminal, names as they are, no warnings."""

import re
import warnings

import pytest
import torch
from rich.console import Console
from running import SMALL, train

from ctrl_rl.cli.main import main
from ctrl_rl.runs import progress

QUICK = ["trainer.updates=1", "evaluation.exact_samples=0"]


@pytest.mark.parametrize("task", ["gaussian", "mixture2d", "gaussian_mean"])
def test_a_run_emits_no_python_warning(tmp_path, task):
    """Without a bound, with one, and with a number; torch warns once a process unless told so."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(tmp_path, "run", f"env={task}", "agent=ctrl", "trainer.updates=2")
    finally:
        torch.set_warn_always(False)


class Clock:
    """Seconds that pass only when told so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def told(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_file_gets_a_line_now_and_then(clock, capsys):
    with progress.bar("train", 400) as report:
        report(0, {})
        for done in range(1, 401):
            clock.now += 0.75  # 300 s in all, a line every 40 updates
            report(done, {"reward": -0.514, "kl": 0.2, "gap": 1.2})
    lines = told(capsys)
    assert lines[0] == "train 0/400"
    assert lines[1] == "train 40/400 reward -0.51 kl 0.20 gap 1.20, 4 min left"
    assert lines[-2] == "train 360/400 reward -0.51 kl 0.20 gap 1.20, 30 s left"
    assert lines[-1] == "train 400/400 reward -0.51 kl 0.20 gap 1.20, took 5 min"
    assert len(lines) == 11


def test_what_is_left_of_a_resumed_run_is_counted_from_where_it_resumed(clock, capsys):
    with progress.bar("train", 400) as report:
        report(390, {})
        clock.now += 1000  # one update: 9 are left
        report(391, {})
        clock.now += 1
        report(400, {})
    assert told(capsys) == [
        "train 390/400",
        "train 391/400, 2.5 h left",
        "train 400/400, took 17 min",
    ]


def test_a_quiet_bar_prints_nothing(capsys):
    with progress.bar("train", 2, quiet=True) as report, progress.waiting("x", quiet=True):
        report(0, {})
        report(2, {"reward": 1.0})
        progress.note("x", quiet=True)
    assert told(capsys) == []


def test_only_work_that_takes_long_is_announced(capsys, monkeypatch):
    with progress.waiting("loading"):
        pass
    assert told(capsys) == []
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    made = []

    class Kept(progress.Timer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(progress, "Timer", Kept)
    with progress.waiting("loading"):
        made[0].join()
    assert told(capsys) == ["loading"]


def test_a_run_whose_output_is_a_file_says_what_it_does_before_it_does_it(tmp_path, capsys):
    train(tmp_path, "run", "evaluation.policy_samples=8")
    lines = told(capsys)
    assert all(line.isprintable() for line in lines)
    assert lines[:3] == [
        "estimating log Z from 32 samples of the prior",
        f"{tmp_path / 'run'}: training ctrl on gaussian",
        "train 0/12",
    ]
    assert re.fullmatch(
        r"train 12/12 reward -?\d\.\d\d kl \d\.\d\d gap -?\d\.\d\d, took \d+ s", lines[3]
    )
    assert lines[4:6] == ["drawing 32 samples of the prior to measure by", "evaluate 0/3"]
    assert re.fullmatch(r"evaluate 3/3, took \d+ s", lines[6])
    assert lines[7] == "drawing pictures"


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def console(**settings):
        return Console(**settings, force_terminal=True, color_system=None, legacy_windows=False)

    monkeypatch.setattr(progress, "Console", console)


def test_a_terminal_gets_a_bar_and_no_lines(terminal, capsys):
    with progress.bar("train", 4) as report, progress.waiting("loading"):
        progress.note("loading")
        report(0, {})
        report(4, {"reward": -0.514})
    shown = capsys.readouterr().err
    assert "loading" not in shown and "━" in shown and "4/4 reward -0.51" in shown


NAME = ":smile: [bold red]x 12 'a'"


@pytest.mark.parametrize("where", ["file", "terminal"])
def test_names_are_printed_as_they_are(where, tmp_path, capsys, request):
    """No emoji, no markup, no colours: in lines, tables and bars."""
    if where == "terminal":
        request.getfixturevalue("terminal")
    words = ["trainer.updates=1", "evaluation.exact_samples=0", f'run.name="{NAME}"']
    assert main(["train", *SMALL, *words, f"run.root={tmp_path}"]) == 0
    shown = capsys.readouterr().err
    run = tmp_path / NAME
    assert f"{run}: training ctrl" in shown and f"picture: {run}/samples.png" in shown
    with progress.bar(NAME, 2) as report:
        report(2, {":smile:": 1.0})
    shown = capsys.readouterr().err
    assert NAME in shown and ":smile: 1.00" in shown


def test_tables_name_controls_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shares = {":smile:": 0.5, "[bold]hat": None}
    row = {"accuracy_per_control": shares, "heldout_accuracy_per_control": shares}
    summary = row | {"agent": ":cat:", "task": "[red]x", "gap_nats": 0.1, "gap_nats_ci": [0, 1]}
    summary |= {"log_z": 0.0, "ess": 0.5, "contradictions": [":cat:"], "prior": row, "exact": None}
    progress.show_summary(tmp_path, summary)
    shown = capsys.readouterr().err
    for text in (
        ":cat: on [red]x, in nats",
        "\n :smile: ",
        "\n [bold]hat ",
        "contradiction: :cat:",
    ):
        assert text in shown
