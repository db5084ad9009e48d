"""Writing a classifier to a folder: whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctrl_rl.classifiers.classifier import DESCRIPTION_FILE, WEIGHTS_FILE
from ctrl_rl.errors import ConfigError

REPORT_FILE, DIAGRAM_FILE = "report.json", "reliability.png"
FILES = {WEIGHTS_FILE, DESCRIPTION_FILE, REPORT_FILE, DIAGRAM_FILE}


def check_replaceable(out: Path) -> None:
    """Refuse a folder that holds anything but a classifier.

    Raises:
        ConfigError: it does, or it is a file.
    """
    if out.is_dir():
        foreign = {file.name for file in out.iterdir()} - FILES
        reason = f"it holds {min(foreign)!r}" if foreign else ""
    else:
        reason = "it is a file" if out.exists() else ""
    if reason:
        raise ConfigError(
            f"will not write a classifier to {out}, since {reason}: choose a new or empty folder, "
            "or that of an earlier classifier"
        )


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """Yields a sibling to fill; it takes the place of `out` only when the block succeeds."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
