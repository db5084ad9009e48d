"""A data set that was stopped, killed, damaged or shared is resumed, or refused in one line."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
from kills import everything, trials

from ctrl_rl.cli.main import main
from ctrl_rl.learning import drawing
from ctrl_rl.learning.drawing import Drawing
from ctrl_rl.marker import locked

WORDS = ["dataset", "env=digits", "kernel.num_steps=3", "batch_size=4", "n=10"]


def draw(folder: Path, *words: str) -> int:
    return main([*WORDS, *words, f"out={folder}"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "whole"
    assert draw(folder) == 0
    return folder


@pytest.fixture
def part(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "part"))


def table(folder: Path, change) -> None:
    file = folder / "metadata.csv"
    file.write_bytes(change(file.read_bytes()))


def without_line(content: bytes, place: int) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[:place] + lines[place + 1 :])


DAMAGE = {
    "the last line of a batch is torn": lambda f: table(f, lambda t: lines(t, 9)[:-2]),
    "a line is torn after its label": lambda f: table(f, lambda t: lines(t, 9)[:-1]),
    "the heading is torn": lambda f: table(f, lambda t: t[:5]),
    "the table is empty": lambda f: table(f, lambda t: b""),
    "a letter is torn": lambda f: table(f, lambda t: lines(t, 5) + "000004.png,é".encode()[:-1]),
    "a quote is never closed": lambda f: table(f, lambda t: lines(t, 5) + b'000004.png,"1\n'),
    "a label is none": lambda f: table(f, lambda t: lines(t, 9) + b"000008.png,99\n000009.png,\n"),
    "a field is missing": lambda f: table(f, lambda t: lines(t, 9) + b"000008.png\n"),
    "a line is missing": lambda f: table(f, lambda t: without_line(t, 3)),
    "the disk had zeros": lambda f: table(f, lambda t: lines(t, 7) + b"\0" * 30 + b"\n"),
    "the table is gone": lambda f: (f / "metadata.csv").unlink(),
    "a picture is gone": lambda f: (f / "000002.png").unlink(),
    "pictures are gone": lambda f: [(f / f"00000{n}.png").unlink() for n in (0, 5, 9)],
    "a picture is empty": lambda f: (f / "000005.png").write_bytes(b""),
    "a picture is torn": lambda f: os.truncate(f / "000009.png", 40),
    "all but the description is gone": lambda f: [
        file.unlink() for file in f.iterdir() if file.name != "dataset.json"
    ],
}


def lines(content: bytes, number: int) -> bytes:
    """The heading and the rows up to a number of lines."""
    return b"".join(content.splitlines(keepends=True)[:number])


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_whole_is_drawn_again(kind, whole, part):
    DAMAGE[kind](part)
    assert draw(part) == 0
    assert everything(part) == everything(whole)


def test_only_the_batch_of_a_missing_picture_is_drawn_again(whole, part, monkeypatch):
    drawn, real = [], Drawing._draw

    def counting(self, number, count):
        drawn.append((number, count))
        return real(self, number, count)

    monkeypatch.setattr(Drawing, "_draw", counting)
    assert draw(part) == 0 and drawn == []
    (part / "000005.png").unlink()
    (part / "000009.png").unlink()
    assert draw(part) == 0 and drawn == [(1, 4), (2, 2)]
    assert everything(part) == everything(whole)


def test_the_folder_is_gone(whole, part):
    shutil.rmtree(part)
    assert draw(part) == 0
    assert everything(part) == everything(whole)


@pytest.mark.parametrize("content", ["", '{"n": 10, "batch', "[]", "3", "[" * 100_000])
def test_a_damaged_description_is_refused_in_one_line(content, part, capsys):
    (part / "dataset.json").write_text(content)
    before = everything(part)
    capsys.readouterr()
    assert draw(part) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and f"{part / 'dataset.json'} is damaged" in told
    assert f"remove {part} to start anew, or give another out=" in told
    assert everything(part) == before


def test_a_table_of_other_columns_is_refused(part, capsys):
    table(part, lambda text: b"file_name,size\n000000.png,1\n")
    assert draw(part) == 2
    assert "has the columns file_name, size; give another out=" in capsys.readouterr().err


@pytest.mark.parametrize(
    "left", ["dataset.json.partial", ".ctrl_rl/lock", ".ctrl_rl/run.json.partial"]
)
def test_what_a_process_killed_at_its_start_left_is_no_hindrance(left, whole, tmp_path):
    file = tmp_path / "part" / left
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert draw(tmp_path / "part") == 0
    assert everything(tmp_path / "part") == everything(whole)


def test_a_second_command_is_refused_by_name(part, capsys):
    with locked(part):
        before = everything(part)
        assert draw(part) == 2
        told = capsys.readouterr().err.strip()
        assert "\n" not in told and f"{part} is in use by process {os.getpid()}" in told
        assert everything(part) == before
    assert not (part / ".ctrl_rl").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_how_to_resume(number, whole, tmp_path, monkeypatch, capsys):
    part, real = tmp_path / "part", Drawing._draw

    def stopped(self, batch, count):
        if batch == 1:
            os.kill(os.getpid(), number)
        return real(self, batch, count)

    monkeypatch.setattr(Drawing, "_draw", stopped)
    assert draw(part) == 130
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == "ctrl-rl: stopped after picture 4 of 10; re-run the command to resume"
    assert not (part / ".ctrl_rl").exists()
    monkeypatch.undo()
    assert draw(part) == 0
    assert everything(part) == everything(whole)


def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path, monkeypatch, capsys):
    part, real, saved = tmp_path / "part", drawing._save_picture, []

    def full(file, sample):
        saved.append(file)
        if len(saved) == 7:
            file.write_bytes(b"\x89PNG half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        real(file, sample)

    monkeypatch.setattr(drawing, "_save_picture", full)
    assert draw(part) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"ctrl-rl: {part} cannot be written: ") and "No space left" in told
    assert "make room, then re-run the command to resume" in told
    monkeypatch.undo()
    assert draw(part) == 0
    assert everything(part) == everything(whole)


def test_a_folder_that_is_deleted_meanwhile_is_one_line(whole, tmp_path, monkeypatch, capsys):
    part, real = tmp_path / "part", Drawing._draw

    def deleting(self, number, count):
        if number == 1:
            shutil.rmtree(part)
        return real(self, number, count)

    monkeypatch.setattr(Drawing, "_draw", deleting)
    assert draw(part) == 2
    assert f"ctrl-rl: {part} cannot be written: " in capsys.readouterr().err
    monkeypatch.undo()
    assert draw(part) == 0
    assert everything(part) == everything(whole)


@pytest.mark.parametrize("root", ["file/deep", "/proc"])
def test_what_cannot_be_written_is_found_before_anything_is_built(
    root, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ctrl_rl.runs.build.build_process", lambda config: pytest.fail("built"))
    assert draw(tmp_path / root / "drawn") == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and "cannot write to" in told


def test_random_kills_of_commands_that_are_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ctrl_rl.unfinished.SAVE_EVERY_S", 0.0)
    told = list(trials(5, 5, tmp_path, ["dataset", "pretrain", "classifier"]))
    assert told and all(line.endswith("as uninterrupted") for line in told)
