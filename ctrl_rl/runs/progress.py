"""Progress bars and the closing table, on standard error, within 80 columns."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ctrl_rl.evaluation.show import COLUMNS, cell


@contextmanager
def bar(
    title: str, total: int, *, quiet: bool = False
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A live bar, invisible if quiet; the yielded function takes (done, figures to show)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[clock]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(title, total=total, figures="", clock="left")

        def report(done: int, figures: Mapping[str, float]) -> None:
            shown = " ".join(f"{name} {value:.2f}" for name, value in figures.items())
            clock = "left" if done < total else ""
            progress.update(task, completed=done, figures=shown, clock=clock)

        yield report


def say(text: str) -> None:
    """Print one line, never broken, to keep paths in it copyable."""
    Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)


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
    Console(stderr=True).print(table)
    if len(summary["accuracy_per_control"]) > 1:
        Console(stderr=True).print(_per_control(rows))
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
