"""Ctrl-C and SIGTERM as a request to stop at a good place.

Clusters and containers send SIGTERM before they end a process: it does what the first Ctrl-C does.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ctrl_rl.errors import CtrlError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_EVERY_S = 1.0
_STOPPED = 130  # exit code after a signal


class Interrupted(CtrlError):
    """The user, or the machine, asked to stop; the message says how to resume."""


def interrupt_on_terminate() -> None:
    """Let SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does, wherever nothing better is set."""
    if threading.current_thread() is threading.main_thread():  # signals belong to it
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Set the event on the first signal; the second one interrupts at once, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: Any) -> None:
        del number, frame
        stop.set()
        restore()

    for number in _SIGNALS:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def stop_with_parent() -> Iterator[None]:
    """Ask this process to stop when the one that started it ends; then end it.

    Workers of a benchmark that was killed would otherwise go on, beside the next one's.
    """
    parent = os.getppid()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_EVERY_S):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if os.getppid() != parent:
            os._exit(_STOPPED)  # nobody waits for a result
