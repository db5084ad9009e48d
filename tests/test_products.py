"""What a command makes replaces an earlier one of its own, and nothing else."""

import os
import signal
from pathlib import Path

import pytest
from sums import SUM, add, send

from ctrl_rl.errors import ConfigError, RunError
from ctrl_rl.interrupts import Interrupted
from ctrl_rl.unfinished import unfinished

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
