"""Commands in forked children, with limits: what hangs, crashes or takes all memory is found out.

Children are forked from one process that has imported everything, as imports take seconds.
"""

import io
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported: nothing is fetched

import torch
from running import train

from ctrl_rl.cli.main import main

MOST_S = 60.0
MOST_BYTES = 6 * 2**30  # of addresses, beyond what the parent has
_OF_LIBRARIES = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Called:
    """How a child ended.

    Attributes:
        code: its exit code, or minus the signal that ended it; None if it had to be ended.
        told: what it printed.
        seconds: until then.
    """

    code: int | None
    told: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line that was printed."""
        return (self.told.strip().splitlines() or [""])[-1]

    def fault(self) -> str | None:
        """What no command may do, whatever it is given; None where all is well."""
        if self.code is None:
            return f"hangs: {self.told[-500:]}"
        if self.code not in (0, 2):
            return f"exit code {self.code}: {self.told[-3000:]}"
        if re.search(r"Traceback|\w+Warning\b", self.told):
            return f"traceback or warning: {self.told[-3000:]}"
        if self.code == 2 and not self.last.startswith("ctrl-rl: "):
            return f"the last line is not the refusal: {self.told[-500:]}"
        return None


@cache
def warm_up() -> None:
    """Import everything before the first fork, by training a little."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        train(Path(folder), "run", "trainer.updates=1", "logger=csv", "agent=sac")


def call(action: Callable[[], int], *, most_s: float = MOST_S) -> Called:
    """Run something in a child; an exception that leaves it is printed as its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        sys.stdout.flush()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _in_child(action, told)
        code: int | None = None
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            took = time.monotonic() - started
            if found:
                code = os.waitstatus_to_exitcode(status)
                break
            if took > most_s:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.005)
        text = told.read_text(errors="replace") if told.is_file() else ""
        return Called(code, text, time.monotonic() - started)


def command(words: list[str], *, most_s: float = MOST_S) -> Called:
    """Run `ctrl-rl` with these words in a child."""
    return call(lambda: main(words), most_s=most_s)


def _in_child(action: Callable[[], int], told: Path) -> None:
    """Never returns."""
    code = 70
    try:
        _limit_memory()
        with told.open("w", errors="backslashreplace") as out:
            os.dup2(out.fileno(), 1)  # libraries in C print there
            os.dup2(out.fileno(), 2)
            with redirect_stdout(out), redirect_stderr(out):
                _show_warnings()
                try:
                    code = action()
                except BaseException:
                    traceback.print_exc(file=out)
                out.flush()
    finally:
        os._exit(code)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _show_warnings() -> None:
    """As a program shows them, also below pytest."""

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object):
        print(f"{category.__name__}: {message}", file=sys.stderr)

    warnings.resetwarnings()
    for category in _OF_LIBRARIES:
        warnings.simplefilter("ignore", category)
    warnings.showwarning = show  # type: ignore[assignment]
