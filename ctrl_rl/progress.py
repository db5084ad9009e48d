"""Progress bars and the closing table, on standard error."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn
from rich.table import Table


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A live bar; the yielded function takes (done, figures to show)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, figures="")

        def report(done: int, figures: Mapping[str, float]) -> None:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            progress.update(task, completed=done, figures=shown)

        yield report


def show_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Print prior, policy and exact conditional as a table, and what contradicts itself."""
    table = Table(title=f"{path}: {summary['agent']} on {summary['task']} (rewards, KL, gap in nats)")
    for heading in ("", "reward", "KL", "gap", "certified", "accuracy", "held-out", "diversity"):
        table.add_column(heading, justify="left" if not heading else "right")
    for source, row in {
        "prior": summary["prior"],
        "policy": summary,
        "exact": summary["exact"],
    }.items():
        if row is not None:
            names = ("reward", "kl_nats", "gap_nats", "gap_nats_certified")
            quality = ("accuracy", "heldout_accuracy", "diversity")
            table.add_row(source, *(_cell(row.get(name)) for name in names + quality))
    console = Console(stderr=True)
    console.print(table)
    low, high = summary["gap_nats_ci"]
    console.print(
        f"gap {summary['gap_nats']:.3f} nats, 95 % interval [{low:.3f}, {high:.3f}]; "
        f"log Z {summary['log_z']:.3f}, ESS {summary['ess']:.2f}"
    )
    for sentence in summary["contradictions"]:
        console.print(f"[yellow]contradiction:[/yellow] {sentence}")
    console.print(f"picture: {path / 'samples.png'}")


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
