"""The project's own marker on a folder, and the lock beside it.

    .ctrl_rl/run.json      the marker: the version of the layout, and the folder's id
    .ctrl_rl/lock          locked by the process that writes into the folder
    .ctrl_rl/holder.json   who that is, for the message to another one

Only folders with the marker are ever emptied. The lock is the operating system's and ends with its
process, however that ends: a lock of a dead process does not exist.
"""

import json
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ctrl_rl.errors import RunError, RunInUseError, one_line
from ctrl_rl.files import PARTIAL, read_json, write_text

FOLDER = ".ctrl_rl"
_LAYOUT = 1
_MARKER, _LOCK, _HOLDER = "run.json", "lock", "holder.json"


def is_marked(path: Path) -> bool:
    """Whether a folder carries the marker."""
    return (path / FOLDER / _MARKER).is_file()


def mark(path: Path) -> None:
    """Put the marker on a folder."""
    (path / FOLDER).mkdir(parents=True, exist_ok=True)
    marker = {"layout": _LAYOUT, "id": uuid.uuid4().hex[:12]}
    write_text(path / FOLDER / _MARKER, json.dumps(marker, indent=2) + "\n")


def unmark(path: Path) -> None:
    """Take the marker off a folder."""
    (path / FOLDER / _MARKER).unlink(missing_ok=True)


def run_id(path: Path) -> str | None:
    """The run's id, or None for a folder of before there were any."""
    try:
        return str(read_json(path / FOLDER / _MARKER)["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_empty(path: Path) -> bool:
    """Whether a folder holds nothing but a lock, or does not exist."""
    return not path.exists() or (
        path.is_dir() and {each.name for each in path.iterdir()} <= {FOLDER}
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made; one that stays empty is removed again.

    Nothing of the lock stays behind in a folder without the marker.

    Raises:
        RunInUseError: another process holds it.
        RunError: the folder cannot be written.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    lock = FileLock(path / FOLDER / _LOCK, timeout=0)
    try:
        (path / FOLDER).mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "since": datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        }
        write_text(path / FOLDER / _HOLDER, json.dumps(holder, indent=2) + "\n")
    except Timeout:
        raise RunInUseError(
            f"{path} is in use by {_holder(path)}; wait until it is done, or stop it"
        ) from None
    except OSError as error:
        lock.release()
        raise RunError(f"cannot write to {path}: {one_line(error)}") from error
    try:
        yield
    finally:
        (path / FOLDER / _HOLDER).unlink(missing_ok=True)
        if not is_marked(path):
            _remove(path / FOLDER, missing)
        lock.release()


def _holder(path: Path) -> str:
    try:
        known = read_json(path / FOLDER / _HOLDER)
        return (
            f"process {known['process']} on {known['host']} since {known['since']} "
            f"({known['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _remove(ours: Path, made: list[Path]) -> None:
    """Remove a lock, and folders that were made for it and are empty, innermost first."""
    for name in (_HOLDER + PARTIAL, _MARKER + PARTIAL, _LOCK):  # the lock goes last
        (ours / name).unlink(missing_ok=True)
    for folder in (ours, *made):
        try:
            folder.rmdir()
        except OSError:
            return  # something else came in
