"""Kill commands at random moments and in the middle of writes: nothing may be lost.

    python tests/kills.py 100 [seed]

Every job is a command with a result. It is run once to its end; then again and again in fresh
folders, killed by KILL, TERM or INT, called again as its message says (and perhaps killed again),
until it ends. The result must be that of the uninterrupted command, bit for bit. Children are
forked from one process that has imported everything, as imports take seconds.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from running import SMALL, contents

from ctrl_rl.cli.main import main

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
AGENTS = ("ctrl", "reinforce", "ppo", "sac", "adjoint", "tb", "nft", "h_transform")
_MOST_KILLS = 3  # of one trial
_LONGEST_S = 600.0
_TIMES = ("wall_s", "machine")


@dataclass(frozen=True)
class Job:
    """A command and what it makes.

    Attributes:
        name: of the job.
        words: the command in a folder.
        again: the command after a kill.
        result: what two equal folders share.
    """

    name: str
    words: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    result: Callable[[Path], Any]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it."""

    code: int
    told: str
    seconds: float
    writes: int


def summary(folder: Path) -> dict[str, Any]:
    """What summary.json says, without times."""
    read = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in read.items() if name not in _TIMES}


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder by name."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def run_of(folder: Path) -> dict[str, Any]:
    """A finished run."""
    run = folder / "run"
    assert not list(run.rglob("*.partial")), list(run.rglob("*.partial"))
    return contents(run) | {"summary": summary(run)}


def training(agent: str) -> Job:
    """A training run of an agent, on the task that suits it."""
    task = {"nft": "digits", "h_transform": "mixture1d"}.get(agent, "mixture1d")
    words = [*SMALL, f"env={task}", f"agent={agent}", "trainer.checkpoint_every=3"]
    words += ["kernel.num_steps=3"] if task == "digits" else []

    def start(folder: Path) -> list[str]:
        return ["train", *words, f"run.root={folder}", "run.name=run"]

    def again(folder: Path) -> list[str]:
        checkpoints = folder / "run" / "checkpoints"
        if any(each.name.isdigit() for each in checkpoints.glob("*")):
            return ["train", f"resume={folder / 'run'}"]
        return [*start(folder), "run.overwrite=true"]

    return Job(f"train {agent}", start, again, run_of)


def repeated(name: str, words: Callable[[Path], list[str]], result: Callable[[Path], Any]) -> Job:
    """A command that is simply called again."""
    return Job(name, words, words, result)


def jobs(folder: Path) -> list[Job]:
    """All jobs; what they start from is made in a folder."""
    [made] = [training("ctrl")]
    ended = run_child(made.words(folder))
    assert ended.code == 0, ended.told
    small = ["n=12", "batch_size=2", "kernel.num_steps=3"]

    def copied(target: Path) -> Path:
        if not (target / "run").exists():
            shutil.copytree(folder / "run", target / "run")
        return target / "run"

    def cells(target: Path) -> dict[str, Any]:
        found = (target / "cells" / "gaussian" / f"{agent}-s1" for agent in ("ctrl", "reinforce"))
        return {run.name: contents(run) | {"summary": summary(run)} for run in found}

    pretraining = ["recipe.updates=12", "recipe.batch_size=8", "prior=digits"]
    return [
        *(training(agent) for agent in AGENTS),
        repeated(
            "evaluate",
            lambda target: ["evaluate", f"run={copied(target)}", "evaluation.policy_samples=8"],
            run_of,
        ),
        repeated(
            "sample",
            lambda target: ["sample", f"run={folder / 'run'}", "control=1", f"out={target}"],
            lambda target: everything(target)["sample-1-strength1-seed0.npz"],
        ),
        repeated(
            "dataset",
            lambda target: ["dataset", "env=digits", *small, f"out={target / 'drawn'}"],
            lambda target: everything(target / "drawn"),
        ),
        repeated(
            "pretrain",
            lambda target: ["pretrain", *pretraining, f"out={target / 'prior'}"],
            lambda target: everything(target / "prior"),
        ),
        repeated(
            "classifier",
            lambda target: [
                *("classifier", "classifier=digits", "classifier.epochs=3"),
                f"out={target / 'classifier'}",
            ],
            lambda target: everything(target / "classifier"),
        ),
        repeated(
            "benchmark",
            lambda target: [
                *("benchmark", "agents=[ctrl,reinforce]", "tasks=[gaussian]", "seeds=[1]"),
                f"overrides={[word for word in SMALL if not word.startswith('env=')]}",
                *(f"root={target / 'cells'}", f"out={target / 'report'}"),
            ],
            cells,
        ),
    ]


def run_child(
    words: list[str],
    number: int | None = None,
    *,
    after_s: float | None = None,
    at_write: int | None = None,
) -> Ended:
    """Run a command in a child, and kill it after some time or in the middle of a write."""
    with tempfile.TemporaryDirectory() as folder:
        told, counted = Path(folder) / "told", Path(folder) / "counted"
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _in_child(words, told, counted, number, at_write)
        code, sent = None, False
        while code is None:
            found, status = os.waitpid(child, os.WNOHANG)
            took = time.monotonic() - started
            if found:
                code = os.waitstatus_to_exitcode(status)
            elif after_s is not None and number is not None and took >= after_s and not sent:
                os.kill(child, number)
                sent = True
            elif took > _LONGEST_S:
                os.kill(child, signal.SIGKILL)
                raise AssertionError(f"{' '.join(words)} hangs: {told.read_text()}")
            time.sleep(0.002)
        writes = int(counted.read_text()) if counted.is_file() else 0
        return Ended(code, told.read_text(), time.monotonic() - started, writes)


def _in_child(
    words: list[str], told: Path, counted: Path, number: int | None, at_write: int | None
) -> None:
    """Never returns."""
    code = 70
    try:
        writes, sync = 0, os.fsync

        def counting(handle: int) -> None:
            nonlocal writes
            writes += 1
            if writes == at_write and number is not None:
                os.kill(os.getpid(), number)
            sync(handle)

        os.fsync = counting
        with told.open("w") as out, redirect_stdout(out), redirect_stderr(out):
            try:
                code = main(words)
            except BaseException as error:
                print(f"Traceback: {type(error).__name__}: {error}")
        counted.write_text(str(writes))
    finally:
        os._exit(code)


def trials(number: int, seed: int, folder: Path, chosen: list[str] | None = None) -> Iterator[str]:
    """Kill `number` times over all jobs; yields one line per trial."""
    generator = random.Random(seed)
    todo = [job for job in jobs(folder / "start") if chosen is None or job.name in chosen]
    whole: dict[str, tuple[Ended, Any]] = {}
    kills = 0
    while kills < number:
        job = todo[0]
        todo = [*todo[1:], job]
        if job.name not in whole:
            place = folder / job.name.replace(" ", "-") / "whole"
            place.mkdir(parents=True)
            ended = run_child(job.words(place))
            assert ended.code == 0, f"{job.name}: {ended.told}"
            whole[job.name] = (ended, job.result(place))
        ended, expected = whole[job.name]
        place = folder / job.name.replace(" ", "-") / f"killed{kills}"
        place.mkdir(parents=True)
        command, story = job.words(place), []
        for _ in range(generator.randint(1, _MOST_KILLS)):
            how = generator.choice(SIGNALS)
            moment: dict[str, Any] = {"after_s": generator.uniform(0, ended.seconds)}
            if ended.writes and generator.random() < 0.5:
                moment = {"at_write": generator.randint(1, ended.writes)}
            died = run_child(command, how, **moment)
            story.append(f"{signal.Signals(how).name} {moment} -> {died.code}")
            where = f"{job.name}: {'; '.join(story)}: {died.told}"
            assert "Traceback" not in died.told, where
            assert died.code in ({-how, 0} if how == signal.SIGKILL else {130, 0}), where
            if died.code == 0:
                break
            kills += 1
            command = job.again(place)
        if died.code != 0:
            finished = run_child(command)
            assert finished.code == 0, f"{job.name}: {'; '.join(story)}: {finished.told}"
        assert job.result(place) == expected, f"{job.name}: {'; '.join(story)}: another result"
        shutil.rmtree(place)
        yield f"{job.name}: {'; '.join(story)}: as uninterrupted"


def _report() -> None:
    torch.set_num_threads(1)
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    sent: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for line in trials(asked, seed, Path(folder)):
            print(line, flush=True)
            sent.update(name for name in re.findall("SIG[A-Z]+", line))
    shown = ", ".join(f"{name} {count}" for name, count in sorted(sent.items()))
    print(f"{sent.total()} signals ({shown}): nothing lost")


if __name__ == "__main__":
    _report()
