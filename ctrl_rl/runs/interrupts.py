"""Ctrl-C as a request to stop at a good place."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ctrl_rl.errors import CtrlError


class Interrupted(CtrlError):
    """The user pressed Ctrl-C; the message says how to resume."""


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Set the event on the first Ctrl-C; the second one interrupts at once, as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    previous = signal.getsignal(signal.SIGINT)

    def request(number: int, frame: Any) -> None:
        del number, frame
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
