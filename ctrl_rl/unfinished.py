"""Results that appear whole or not at all, of work that may stop and be resumed.

    priors/mine                the result
    priors/mine.unfinished/    until it is there:
        .ctrl_rl/              the project's marker, and the lock
        progress.json          settings, finished updates, and the hash of
        000120.safetensors     the state after them; nothing is pickled
        result/                the result, while it is written
        replaced/              an earlier result, until the new one is in its place

A process that is killed at any moment leaves the earlier result or the new one, and work that the
same command resumes.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ctrl_rl.errors import ConfigError, NonFiniteError, RunError, one_line
from ctrl_rl.files import open_to_others, sync, whole_folder, write_tensors, write_text
from ctrl_rl.interrupts import Interrupted, stop_on_interrupt
from ctrl_rl.marker import is_empty, is_marked, locked, mark, unmark
from ctrl_rl.products import Product

SUFFIX = ".unfinished"
SAVE_EVERY_S = 60.0  # so much is lost at most when a process is killed
_PROGRESS, _RESULT, _REPLACED = "progress.json", "result", "replaced"
_OURS = re.compile(r"(progress\.json|\d+\.safetensors|result|replaced)(\.partial)?")


class Steps(Protocol):
    """Work in updates; between two of them its state can be put aside.

    Attributes:
        done: number of finished updates.
        total: how many there will be.
    """

    done: int
    total: int

    def step(self) -> float:
        """Make one more; returns its loss."""

    def state(self) -> dict[str, Tensor]:
        """All that the updates to come depend on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave, bit for bit."""


class Unfinished:
    """A result that is being made; use `unfinished`.

    Args:
        out: where the result goes.
        product: what it is.
        settings: all that it depends on, as json.
    """

    def __init__(self, out: Path, product: Product, settings: Mapping[str, Any]) -> None:
        self.out, self.product = out, product
        self.folder = out.parent / (out.name + SUFFIX)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.progress: dict[str, Any] | None = None  # what is saved

    def check(self) -> None:
        """Refuse, before anything is written, to touch what is not ours.

        Raises:
            ConfigError: the result may not replace what is there, or the folder beside it is
                another's.
        """
        self.product.check_replaceable(self.out)
        if not is_empty(self.folder) and not is_marked(self.folder):
            raise ConfigError(
                f"{self.folder} is needed while {self.out} is made, and is not the project's own: "
                "move it away, or choose another folder for the result"
            )

    def open(self) -> None:
        """Find what an earlier attempt left, in the locked folder.

        Raises:
            ConfigError: it had other settings.
            RunError: its progress is damaged.
        """
        self._tidy()
        if (self.folder / _PROGRESS).is_file():
            progress = self._read()
            self._check_same(progress["settings"])
            self.progress = progress
        elif not is_marked(self.folder):
            mark(self.folder)

    def finish(self, steps: Steps, report: Callable[[int, float], None]) -> None:
        """Make the updates that are left; the state is saved every minute, at a stop, at the end.

        Args:
            steps: the work, before its first update.
            report: called with (finished updates, loss) after each.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the update was finished and saved.
            RunError: what is saved is damaged.
        """
        if self.progress is not None:
            self._restore(steps, self.progress)
        with stop_on_interrupt() as stop:
            saved = time.monotonic()
            while steps.done < steps.total:
                loss = steps.step()
                report(steps.done, loss)
                stopped, last = stop.is_set(), steps.done == steps.total
                if stopped or last or time.monotonic() - saved >= SAVE_EVERY_S:
                    self._save(steps)
                    saved = time.monotonic()
                if stopped:
                    raise Interrupted(
                        f"stopped after update {steps.done} of {steps.total} and saved; re-run the "
                        "command to resume"
                    )

    @contextmanager
    def result(self) -> Iterator[Path]:
        """Yields a folder to fill; it becomes the result only when the block succeeds."""
        with whole_folder(self.folder / _RESULT) as folder:
            yield folder
            open_to_others(folder)
        try:
            self.product.check_replaceable(self.out)  # which others may have touched meanwhile
        except ConfigError as error:
            raise RunError(f"{error}, and re-run the command; {self.describe_saved()}") from error
        with stop_on_interrupt():  # not between the two moves
            try:
                if self.out.exists():
                    self.out.rename(self.folder / _REPLACED)
                (self.folder / _RESULT).rename(self.out)
            finally:
                self._tidy()
            sync(self.out.parent)
            self.clear()

    def clear(self) -> None:
        """Remove all but the result and the lock."""
        if not self.folder.is_dir():
            return
        (self.folder / _PROGRESS).unlink(missing_ok=True)  # first: it promises the state
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        unmark(self.folder)
        self.progress = None

    def describe_saved(self) -> str:
        """What a resumption finds."""
        if self.progress is None:
            return "nothing is saved yet"
        return f"update {self.progress['done']} of {self.progress['of']} is saved"

    @property
    def _anew(self) -> str:
        return f"remove {self.folder} to start anew"

    def _tidy(self) -> None:
        """Put the earlier result back if the new one did not take its place, or else drop it."""
        replaced = self.folder / _REPLACED
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)
        shutil.rmtree(replaced, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        file = self.folder / _PROGRESS
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            progress = {
                "settings": dict(read["settings"]),
                "done": int(read["done"]),
                "of": int(read["of"]),
                "sha256": str(read["sha256"]),
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{file} is damaged ({one_line(error)}); {self._anew}") from error
        return progress

    def _check_same(self, before: Mapping[str, Any]) -> None:
        for name in sorted({*before, *self.settings}):
            was, now = before.get(name), self.settings.get(name)
            if was != now:
                long = any(len(str(each)) > 40 for each in (was, now))
                values = "" if long else f" ({was}, now {now})"
                raise ConfigError(
                    f"{self.folder} holds an unfinished {self.product.name} with another "
                    f"{name}{values}; give the earlier one to resume it, or {self._anew}"
                )

    def _save(self, steps: Steps) -> None:
        """Write the state; the one before stays until the new one is whole."""
        file = self.folder / f"{steps.done:06d}.safetensors"
        write_tensors(file, steps.state())
        progress = {
            "settings": self.settings,
            "done": steps.done,
            "of": steps.total,
            "sha256": _hash(file),
        }
        write_text(self.folder / _PROGRESS, json.dumps(progress, indent=2) + "\n")
        self.progress = progress
        for other in self.folder.glob("*.safetensors*"):
            if other != file:
                other.unlink()

    def _restore(self, steps: Steps, progress: Mapping[str, Any]) -> None:
        file = self.folder / f"{progress['done']:06d}.safetensors"
        try:
            if _hash(file) != progress["sha256"]:
                raise ValueError("it is not what was written")
            steps.restore(load_file(file))
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            reason = one_line(error, 200)
            raise RunError(f"{file} is damaged ({reason}); {self._anew}") from error


@contextmanager
def unfinished(out: Path, product: Product, settings: Mapping[str, Any]) -> Iterator[Unfinished]:
    """Reserve a folder for a result, and find what an earlier attempt left.

    Args:
        out: the folder; an earlier product in it is replaced when the new one is whole.
        product: what it will be.
        settings: all that the result depends on, as json; an earlier attempt must share them.

    Raises:
        ConfigError: as in `Unfinished.check`, or an earlier attempt had other settings.
        RunInUseError: another process makes this result.
        RunError: nothing can be written there, or what is saved is damaged.
        Interrupted: Ctrl-C or SIGTERM; the message says how to resume.
    """
    work = Unfinished(out.expanduser().resolve(), product, settings)
    work.check()
    try:
        with locked(work.folder):
            work.open()
            try:
                yield work
            except (ConfigError, NonFiniteError):
                work.clear()  # the same settings would end here again
                raise
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted; {work.describe_saved()}; re-run the command to resume"
                ) from None
            except (OSError, SafetensorError) as error:
                raise RunError(
                    f"{work.out} cannot be written: {one_line(error)}; {work.describe_saved()}: "
                    "make room, then re-run the command"
                ) from error
            finally:
                if work.progress is None:
                    work.clear()
    finally:
        with suppress(OSError):
            work.folder.rmdir()  # if it is empty


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
