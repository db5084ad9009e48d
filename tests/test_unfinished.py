"""Work that stops, is killed or meets foreign folders: nothing is lost, nothing else touched."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import threading
import traceback
from pathlib import Path

import pytest
import torch

from ctrl_rl.errors import ConfigError, NonFiniteError, RunError, RunInUseError
from ctrl_rl.interrupts import Interrupted, interrupt_on_terminate
from ctrl_rl.marker import locked
from ctrl_rl.products import Product
from ctrl_rl.unfinished import unfinished

SUM = Product(
    name="sum",
    files=re.compile(r"sum\.json|parts/\d+\.txt"),
    told_by="sum.json",
    fields=frozenset({"sum", "terms"}),
)


class Sum:
    """Adds seeded numbers; `at` is called after each."""

    def __init__(self, total=6, at=lambda done: None, size=1):
        self.done, self.total, self.at, self.size = 0, total, at, size
        self.generator = torch.Generator().manual_seed(0)
        self.value = torch.zeros(size, dtype=torch.float64)

    def step(self):
        self.value += torch.rand(self.size, generator=self.generator, dtype=torch.float64) / 3
        self.done += 1
        self.at(self.done)
        return self.value[0].item()

    def state(self):
        done = torch.tensor(self.done)
        return {"value": self.value, "generator": self.generator.get_state(), "done": done}

    def restore(self, state):
        self.done, self.value = int(state["done"]), state["value"]
        self.generator.set_state(state["generator"])


def add(out, *, seen=None, writing=lambda: None, settings=None, **given):
    """Sum into a folder; returns the numbers of the updates that were made."""
    steps, made = Sum(**given), []
    with unfinished(out, SUM, settings or {"size": 1, "rate": 0.5}) as work:
        work.finish(steps, lambda done, loss: made.append(done))
        with work.result() as folder:
            (folder / "sum.json").write_text(json.dumps({"sum": loss(steps), "terms": 6}))
            writing()
    return made


def loss(steps):
    return steps.value.sum().item().hex()


def everything(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def send(number, when):
    return lambda done: os.kill(os.getpid(), number) if done == when else None


@pytest.fixture
def every_update(monkeypatch):
    monkeypatch.setattr("ctrl_rl.unfinished.SAVE_EVERY_S", 0.0)


def killed(out, **given):
    """Run in a child that is killed; it must have died of that."""
    child = os.fork()
    if child == 0:
        try:
            add(out, **given)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_update_and_the_same_call_resumes(tmp_path, number):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert add(whole) == [1, 2, 3, 4, 5, 6]
    handler = signal.getsignal(number)
    told = r"stopped after update 4 of 6 and saved; re-run the command to resume"
    with pytest.raises(Interrupted, match=told):
        add(out, at=send(number, 4))
    assert signal.getsignal(number) is handler
    assert not out.exists()
    left = {path.name for path in (tmp_path / "out.unfinished").iterdir()}
    assert left == {".ctrl_rl", "progress.json", "000004.safetensors"}
    assert add(out) == [5, 6]
    assert everything(out) == everything(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_the_second_signal_stops_at_once_and_loses_one_update_at_most(tmp_path, every_update):
    def twice(done):
        if done == 4:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="update 3 of 6 is saved; re-run the command to resume"):
        add(tmp_path / "out", at=twice)
    assert add(tmp_path / "out") == [4, 5, 6]


@pytest.mark.parametrize("when", [1, 3, 6])
def test_a_killed_process_is_resumed_from_its_last_save(tmp_path, every_update, when):
    whole, out = tmp_path / "whole", tmp_path / "out"
    add(whole)
    killed(out, at=send(signal.SIGKILL, when))
    assert add(out) == list(range(when, 7))  # its last update was not saved yet
    assert everything(out) == everything(whole)
    killed(out, writing=lambda: os.kill(os.getpid(), signal.SIGKILL))  # of a second result
    assert everything(out) == everything(whole)
    assert add(out) == []
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


CALLS = ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir", "open")
NOT_REACHED = 7


def struck(out, number, call, place):
    """Run in a child that gets a signal at the n-th call of a function of `os`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, seen, real = 0, [], getattr(os, call)

    def striking(*given, **named):
        seen.append(given)
        if len(seen) == place:
            os.kill(os.getpid(), number)
        return real(*given, **named)

    try:
        interrupt_on_terminate()
        setattr(os, call, striking)
        add(out, total=2)
    except (Interrupted, KeyboardInterrupt):
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        os._exit(code if len(seen) >= place else NOT_REACHED)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_at_any_write_or_move_leaves_a_result_or_a_way_to_it(
    tmp_path, every_update, number
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    add(whole, total=2)
    moments = 0
    for call in CALLS:
        for place in range(1, 100):
            code = struck(out, number, call, place)
            if code == NOT_REACHED:
                break
            moments += 1
            assert code in ({-signal.SIGKILL} if number == signal.SIGKILL else {0, 130})
            assert not out.exists() or everything(out) == everything(whole)
            add(out, total=2)
            assert everything(out) == everything(whole)
            assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert moments > 40


def test_an_earlier_result_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    out = tmp_path / "out"
    add(out)
    (out / "parts").mkdir()
    (out / "parts" / "1.txt").write_text("of another version")
    earlier = everything(out)

    def full():
        assert everything(out) == earlier
        raise OSError(errno.ENOSPC, "No space left on device", "here")

    with pytest.raises(RunError) as told:
        add(out, writing=full)
    for part in (str(out), "No space left", "update 6 of 6 is saved", "make room, then re-run"):
        assert part in str(told.value)
    assert "\n" not in str(told.value) and everything(out) == earlier

    real, moves = Path.rename, []

    def rename(path, target):
        moves.append(path.name)
        if target == out and path.name == "result":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match="Input/output error"):
        add(out)
    assert "out" in moves and everything(out) == earlier
    monkeypatch.undo()
    assert add(out) == [] and set(everything(out)) == {"sum.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_what_was_saved_is_whole(tmp_path, every_update):
    whole, out = tmp_path / "whole", tmp_path / "out"
    add(whole, size=4096)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill(done):
        if done == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))

    try:
        with pytest.raises(RunError, match="update 3 of 6 is saved: make room") as told:
            add(out, size=4096, at=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(told.value)
    assert add(out, size=4096) == [4, 5, 6]
    assert everything(out) == everything(whole)


OTHER = {
    "rate": ({"size": 1, "rate": 0.25}, r"another rate \(0\.5, now 0\.25\)"),
    "missing": ({"size": 1}, r"another rate \(0\.5, now None\)"),
    "new": ({"size": 1, "rate": 0.5, "mixup": 1}, r"another mixup \(None, now 1\)"),
    "long": ({"size": list(range(100)), "rate": 0.5}, r"another size; give"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_are_refused_by_name_and_removal_starts_anew(tmp_path, case):
    out, rest = tmp_path / "out", tmp_path / "out.unfinished"
    settings, reason = OTHER[case]
    with pytest.raises(Interrupted):
        add(out, at=send(signal.SIGTERM, 2))
    before = everything(rest)
    with pytest.raises(ConfigError, match=reason) as told:
        add(out, settings=settings)
    assert f"remove {rest} to start anew" in str(told.value)
    assert everything(rest) == before
    for file in sorted(rest.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert add(out, settings=settings) == [1, 2, 3, 4, 5, 6]


DAMAGE = {
    "truncated": lambda rest: (rest / "progress.json").write_text('{"settings": {'),
    "list": lambda rest: (rest / "progress.json").write_text("[]"),
    "nested": lambda rest: (rest / "progress.json").write_text("[" * 100_000),
    "words": lambda rest: (rest / "progress.json").write_text(
        json.dumps(json.loads((rest / "progress.json").read_text()) | {"done": "two"})
    ),
    "binary": lambda rest: (rest / "progress.json").write_bytes(b"\xff\xfe"),
    "flipped": lambda rest: flip(rest / "000002.safetensors"),
    "cut": lambda rest: os.truncate(rest / "000002.safetensors", 20),
    "gone": lambda rest: (rest / "000002.safetensors").unlink(),
}


def flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_says_how_to_start_anew(tmp_path, kind):
    out, rest = tmp_path / "out", tmp_path / "out.unfinished"
    with pytest.raises(Interrupted):
        add(out, at=send(signal.SIGTERM, 2))
    DAMAGE[kind](rest)
    with pytest.raises(RunError, match="is damaged") as told:
        add(out)
    assert f"remove {rest} to start anew" in str(told.value) and "\n" not in str(told.value)
    assert not out.exists() and (rest / "progress.json").exists()


def test_a_second_process_is_refused_by_name(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        add(out, at=send(signal.SIGTERM, 2))
    with locked(tmp_path / "out.unfinished"):
        before = everything(tmp_path)
        with pytest.raises(RunInUseError, match=rf"in use by process {os.getpid()} on "):
            add(out)
        assert everything(tmp_path) == before
    (tmp_path / "link").symlink_to(out)  # the same folder by another name
    with locked(tmp_path / "out.unfinished"), pytest.raises(RunInUseError):
        add(tmp_path / "link")
    assert add(out) == [3, 4, 5, 6]


FOREIGN = {
    "thesis.tex": "it holds 'thesis.tex'",
    "parts/notes.txt": "it holds 'parts/notes.txt'",
    ".git/HEAD": "it holds '.git/HEAD'",
    "parts/1.txt": "it has no sum.json of one",
    "sum.json": "it has no sum.json of one",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_only_an_earlier_product_is_replaced(tmp_path, name):
    out = tmp_path / "out"
    file = out / name
    file.parent.mkdir(parents=True)
    file.write_text('{"sum": 3}')
    with pytest.raises(ConfigError, match=FOREIGN[name]):
        add(out, at=lambda done: pytest.fail("computed first"))
    assert file.read_text() == '{"sum": 3}'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_else_may_not_be_replaced(tmp_path):
    add(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1.txt").write_text("mine")
    (tmp_path / "out" / "parts").symlink_to(elsewhere)
    (tmp_path / "file").write_text("")
    (tmp_path / "busy.unfinished").mkdir()
    (tmp_path / "busy.unfinished" / "result").mkdir()
    for name, reason in {
        "out": "it holds 'parts'",
        "file": "it is a file",
        "busy": "busy.unfinished is needed while .* is made, and is not the project's own",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            add(tmp_path / name, at=lambda done: pytest.fail("computed first"))
    with pytest.raises(ConfigError, match="root of all folders"):
        add(Path("/"))
    assert (elsewhere / "1.txt").read_text() == "mine"
    assert (tmp_path / "busy.unfinished" / "result").is_dir()
    (tmp_path / "empty").mkdir()
    assert len(add(tmp_path / "empty")) == 6


def test_what_was_put_into_the_folder_meanwhile_is_not_deleted(tmp_path):
    out = tmp_path / "out"
    add(out)

    def put(done):
        (out / "mine.txt").write_text("mine")

    with pytest.raises(RunError, match="'mine.txt'.* re-run the command; update 6 of 6 is saved"):
        add(out, at=put)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    assert add(out) == []


@pytest.mark.parametrize("root", ["file/deep", "/proc"])
def test_what_cannot_be_written_is_found_before_any_update(tmp_path, root):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to"):
        add(tmp_path / root / "out", at=lambda done: pytest.fail("computed first"))


@pytest.mark.parametrize("error", [NonFiniteError("nan"), ConfigError("no better than chance")])
def test_what_would_end_the_same_way_is_not_kept(tmp_path, every_update, error):
    def fail(done):
        if done == 3:
            raise error

    with pytest.raises(type(error)):
        add(tmp_path / "deep" / "out", at=fail)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_deleted_meanwhile_is_one_line(tmp_path, every_update):
    def delete(done):
        if done == 3:
            shutil.rmtree(tmp_path / "out.unfinished")

    with pytest.raises(RunError, match="cannot be written") as told:
        add(tmp_path / "out", at=delete)
    assert "\n" not in str(told.value)
    assert len(add(tmp_path / "out")) == 6


def test_files_are_readable_by_others(tmp_path):
    previous = os.umask(0o027)
    try:
        with pytest.raises(Interrupted):
            add(tmp_path / "out", at=send(signal.SIGTERM, 2))
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in written} == {0o640}
        with unfinished(tmp_path / "tight", SUM, {}) as work, work.result() as folder:
            (folder / "sum.json").touch(0o600)  # as safetensors does
        assert (tmp_path / "tight" / "sum.json").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(previous)


def test_it_works_outside_the_main_thread(tmp_path):
    made = []
    thread = threading.Thread(target=lambda: made.extend(add(tmp_path / "out")))
    thread.start()
    thread.join()
    assert made == [1, 2, 3, 4, 5, 6]
