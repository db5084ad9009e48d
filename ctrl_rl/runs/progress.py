"""Progress and the closing table, on standard error, within 80 columns.

A terminal gets live bars; a file or a pipe gets a line at the start, now and then, and at the end.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ctrl_rl.evaluation.show import COLUMNS, cell

_EVERY = 30.0  # seconds between lines of progress
_PATIENCE = 5.0  # seconds
Report = Callable[[int, Mapping[str, float]], None]


def _console() -> Console:
    # Names of runs and controls are the user's: they are printed as they are.
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def bar(title: str, total: int, *, quiet: bool = False) -> AbstractContextManager[Report]:
    """A live bar, or lines where output is no terminal; nothing if quiet.

    Args:
        title: what is done, such as "train".
        total: how much of it.
        quiet: show nothing.

    Returns:
        The context of a function that takes (done, figures to show).
    """
    if quiet:
        return _silence()
    return _live(title, total) if _console().is_terminal else _lines(title, total)


@contextmanager
def _silence() -> Iterator[Report]:
    yield lambda done, figures: None


@contextmanager
def _live(title: str, total: int) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[clock]}", markup=False),
    )
    with Progress(*columns, console=_console()) as progress:
        task = progress.add_task(title, total=total, figures="", clock="left")

        def report(done: int, figures: Mapping[str, float]) -> None:
            clock = "left" if done < total else ""
            progress.update(task, completed=done, figures=_shown(figures), clock=clock)

        yield report


@contextmanager
def _lines(title: str, total: int) -> Iterator[Report]:
    """Lines such as `train 120/400 reward -0.51 kl 0.20, 3 min left`."""
    began: tuple[float, int] | None = None
    told = 0.0

    def report(done: int, figures: Mapping[str, float]) -> None:
        nonlocal began, told
        now = monotonic()
        if began is None:
            began = now, done  # a run that is resumed does not begin at 0
        elif done < total and now - told < _EVERY:
            return
        told = now
        (start, first), clock = began, ""
        if first < done:
            spent = now - start
            left = spent / (done - first) * (total - done)
            clock = f", {_duration(left)} left" if done < total else f", took {_duration(spent)}"
        say(" ".join(filter(None, (title, f"{done}/{total}", _shown(figures)))) + clock)

    yield report


def _shown(figures: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.2f}" for name, value in figures.items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    """Print one line, never broken, to keep paths in it copyable."""
    _console().print(text, soft_wrap=True)


def note(text: str, *, quiet: bool = False) -> None:
    """Print what is done next, where output is no terminal."""
    if not quiet and not _console().is_terminal:
        say(text)


@contextmanager
def waiting(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Print what is being done, where output is no terminal, once it takes long.

    For work that may be refused: most refusals come soon, and then the error is all that is told.
    """
    timer = Timer(_PATIENCE, note, (text,), {"quiet": quiet})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def show_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Print prior, policy and exact conditional as a table, and any contradictions."""
    say(f"\n{path}: {summary['agent']} on {summary['task']}, in nats")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    rows = {"prior": summary["prior"], "policy": summary, "exact": summary["exact"]}
    for source, row in rows.items():
        if row is not None:
            table.add_row(source, *(cell(row.get(name)) for name in COLUMNS.values()))
    _console().print(table)
    if len(summary["accuracy_per_control"]) > 1:
        _console().print(_per_control(rows))
    low, high = summary["gap_nats_ci"]
    say(
        f"gap {summary['gap_nats']:.3f} nats, interval [{low:.3f}, {high:.3f}]; "
        f"log Z {summary['log_z']:.3f}, ESS {summary['ess']:.2f}"
    )
    if "conditions" in summary:
        measured, whole = summary["conditions"]["measured"], summary["conditions"]["in_all"]
        of = "infinitely many" if whole is None else f"{whole:,}"
        say(f"measured on {measured:,} of {of} conditions, drawn at random")
    for sentence in summary["contradictions"]:
        say(f"contradiction: {sentence}")
    say(f"picture: {path / 'samples.png'}")
    if (path / "asked.png").is_file():
        say(f"what was asked for, and what samples show: {path / 'asked.png'}")
    if (path / "denoising.gif").is_file():
        say(f"film: {path / 'denoising.gif'}")


def _per_control(rows: Mapping[str, Mapping[str, Any] | None]) -> Table:
    """Accuracy of every control; in brackets by its held-out judge, if any control has one."""
    known = {source: row for source, row in rows.items() if row is not None}
    name = "heldout_accuracy_per_control"
    judged = any(share is not None for row in known.values() for share in row[name].values())
    title = "accuracy (by a held-out judge)" if judged else "accuracy"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(title, overflow="ellipsis", no_wrap=True)
    for source in known:
        table.add_column(source, justify="right")
    for control in next(iter(known.values()))[name]:
        cells = []
        for row in known.values():
            share = cell(row["accuracy_per_control"][control])
            cells.append(f"{share} ({cell(row[name][control])})" if judged else share)
        table.add_row(control, *cells)
    return table
