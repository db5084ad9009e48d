"""Results of a grid's cells, read from their folders alone."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_rl.benchmark.cell import State, failure_of, state_of
from ctrl_rl.benchmark.grid import Cell, Grid
from ctrl_rl.errors import RunError
from ctrl_rl.runs.folder import Run, read_summary

# Figures of a policy, as summary.json names them, in nats where they have a unit.
FIGURES = (
    "gap_nats",
    "gap_nats_certified",
    "kl_nats",
    "reward",
    "accuracy",
    "heldout_accuracy",
    "diversity",
    "ess",
    "log_z",
    "steps",
    "denoiser_calls",
    "reward_calls",
    "wall_s",
)


@dataclass(frozen=True)
class Result:
    """One cell and its result.

    Attributes:
        cell: the cell.
        state: of its folder.
        summary: its summary.json if it is finished, otherwise empty.
        error: the one-line error if it failed, otherwise empty.
    """

    cell: Cell
    state: State
    summary: dict[str, Any]
    error: str

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
            RunError: it is damaged, or gone although the cell was trained.
        """
        lines = list(Run(self.cell.folder).metrics())
        if self.summary.get("steps") and not lines:
            raise RunError(
                f"{self.cell.folder / 'metrics.jsonl'} has nothing; put it back, or remove the "
                "folder, and the cell is trained anew"
            )
        return lines


def read_results(grid: Grid) -> list[Result]:
    """The results of all cells, in the grid's order."""
    results = []
    for cell in grid.cells:
        state, summary, error = state_of(cell.folder), {}, ""
        if state == "finished":
            summary = read_summary(cell.folder)
        elif state == "failed":
            error = failure_of(cell.folder)
        results.append(Result(cell, state, summary, error))
    return results


def figures_of(results: Sequence[Result], name: str) -> list[float]:
    """One figure of all finished cells that have it."""
    values = (result.summary.get(name) for result in results)
    return [float(value) for value in values if value is not None]


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one row per cell; missing figures are empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ("task", "agent", "seed", "state", *FIGURES, "gap_nats_low", "gap_nats_high")
        writer.writerow((*head, "prior_gap_nats", "folder", "error"))
        for result in results:
            cell, summary = result.cell, result.summary
            low, high = summary.get("gap_nats_ci") or (None, None)
            figures = [summary.get(name) for name in FIGURES]
            prior = (summary.get("prior") or {}).get("gap_nats")
            row = (cell.task, cell.agent, cell.seed, result.state, *figures, low, high, prior)
            writer.writerow((*row, cell.folder, result.error))
