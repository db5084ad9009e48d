"""The report folder: report.md, results.csv, pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl_rl.benchmark.gallery import draw_gallery
from ctrl_rl.benchmark.grid import Grid
from ctrl_rl.benchmark.pictures import draw_curves, draw_pareto
from ctrl_rl.benchmark.results import Result, figures_of, read_results, write_csv
from ctrl_rl.benchmark.statistics import interquartile_interval, interquartile_mean
from ctrl_rl.errors import CtrlError
from ctrl_rl.runs.progress import say

_COLUMNS = {  # heading: (figure of summary.json, format)
    "held-out accuracy": ("heldout_accuracy", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "KL": ("kl_nats", ".3f"),
    "reward": ("reward", ".3f"),
    "ESS": ("ess", ".3f"),
    "denoiser calls": ("denoiser_calls", ",.0f"),
    "reward calls": ("reward_calls", ",.0f"),
    "wall s": ("wall_s", ",.1f"),
}
_LEGEND = """\
Every figure is the interquartile mean over seeds; gap, KL and reward are in nats. The gap says how
far the policy is from the exact conditional, and ranks the agents; its interval is a 95 % bootstrap
interval over seeds, which of three seeds or fewer is their range. Cells that failed are in no
average, which flatters an agent that has some. What needs no training has one cell a task. Wall
seconds compare only where all cells ran on one machine under one load. Averages and intervals
follow Agarwal et al. 2021, [arXiv 2108.13264](https://arxiv.org/abs/2108.13264)."""

Agents = Mapping[str, Sequence[Result]]


def write_report(grid: Grid) -> None:
    """Write the report from the cells' folders.

    Raises:
        CtrlError: no cell is finished.
    """
    results = read_results(grid)
    finished = [result for result in results if result.summary]
    if not finished:
        failed = [result for result in results if result.error]
        reason = f"; {failed[0].cell.name}: {failed[0].error}" if failed else ""
        raise CtrlError(f"none of {len(results)} cells is finished{reason}")
    grid.out.mkdir(parents=True, exist_ok=True)
    write_csv(grid.out / "results.csv", results)
    tasks = {name: _by_agent(results, name) for name in dict.fromkeys(r.cell.task for r in results)}
    counts = f"{len(results)} cells, {len(finished)} finished"
    lines = ["# Benchmark", "", f"{counts}.", "", _LEGEND, ""]
    if len(tasks) > 1:
        lines += _overall(tasks)
    for task, agents in tasks.items():
        lines += _section(grid.out, task, agents)
    (grid.out / "report.md").write_text("\n".join(lines).rstrip() + "\n")
    say(f"report of {counts}: {grid.out / 'report.md'}")


def _by_agent(results: Sequence[Result], task: str) -> dict[str, list[Result]]:
    """Results of a task by agent, the smallest gap first, agents without one last."""
    by_agent: dict[str, list[Result]] = {}
    for result in results:
        if result.cell.task == task:
            by_agent.setdefault(result.cell.agent, []).append(result)

    def rank(entry: tuple[str, list[Result]]) -> tuple[bool, float]:
        gaps = figures_of(entry[1], "gap_nats")
        return not gaps, interquartile_mean(gaps) if gaps else 0.0

    return dict(sorted(by_agent.items(), key=rank))


def _section(out: Path, task: str, agents: Agents) -> list[str]:
    headings = ["", "agent", "gap", "95 % interval", *_COLUMNS, "seeds", "not finished"]
    lines = [f"## {task}", "", _row(headings), "|---:|---|" + "---:|" * (len(headings) - 2)]
    finished = [result for results in agents.values() for result in results if result.summary]
    summary: dict[str, Any] = finished[0].summary if finished else {}
    for place, (agent, results) in enumerate(agents.items(), start=1):
        gaps = figures_of(results, "gap_nats")
        cells = [_mean(results, figure, form) for figure, form in _COLUMNS.values()]
        unfinished = sum(not result.summary for result in results)
        gap = [_mean(results, "gap_nats", ".3f"), _interval([gaps])]
        lines.append(
            _row([str(place), f"`{agent}`", *gap, *cells, str(len(gaps)), str(unfinished)])
        )
    for source in ("prior", "exact"):
        if row := summary.get(source):
            cells = [_number(row.get(figure), form) for figure, form in _COLUMNS.values()]
            lines.append(
                _row(["", source, _number(row.get("gap_nats"), ".3f"), "–", *cells, "", ""])
            )
    missing = [r for results in agents.values() for r in results if not r.summary]
    if missing:
        lines.append("")
    lines += [f"- `{r.cell.name}` is {r.state}. {r.error}".rstrip() for r in missing]
    if not finished:
        return [*lines, ""]
    draw_pareto(out / f"pareto-{task}.png", task, agents)
    draw_gallery(out / f"samples-{task}.png", task, agents)
    pictures = {
        "pareto": "Reward against KL",
        "samples": "Samples of every agent, of the exact conditional and of the prior",
    }
    firsts = [next(iter(result.metrics()), None) for result in finished]
    trained = [first for first in firsts if first is not None]
    if trained and all("gap_nats" in first for first in trained):  # not with prompts
        draw_curves(out / f"gap-{task}.png", task, agents)
        pictures = {"gap": "Gap against denoiser calls and against seconds", **pictures}
    for name, title in pictures.items():
        lines += ["", f"![{title}]({name}-{task}.png)"]
    return [*lines, ""]


def _overall(tasks: Mapping[str, Agents]) -> list[str]:
    """All tasks together; gaps are averaged as fractions of the prior's gap."""
    scores: dict[str, list[list[float]]] = {}
    for agents in tasks.values():
        for agent, results in agents.items():
            fractions = [
                r.summary["gap_nats"] / r.summary["prior"]["gap_nats"] for r in results if r.summary
            ]
            scores.setdefault(agent, []).append(fractions)
    complete = {agent: strata for agent, strata in scores.items() if all(strata)}
    means = {agent: interquartile_mean(sum(strata, [])) for agent, strata in complete.items()}
    lines = [
        "## All tasks",
        "",
        "Gap as a fraction of the prior's: 0 is the exact conditional, 1 nothing learned. The",
        "interval is stratified by task. An agent without a finished cell in a task has none.",
        "",
        _row(["", "agent", "gap / prior's gap", "95 % interval"]),
        "|---:|---|---:|---:|",
    ]
    for place, agent in enumerate(sorted(means, key=lambda name: means[name]), start=1):
        interval = _interval(complete[agent])
        lines.append(_row([str(place), f"`{agent}`", f"{means[agent]:.3f}", interval]))
    lines += [_row(["", f"`{a}`", "–", "–"]) for a in scores if a not in complete]
    return [*lines, ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(results: Sequence[Result], figure: str, form: str) -> str:
    values = figures_of(results, figure)
    return _number(interquartile_mean(values) if values else None, form)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(strata: Sequence[Sequence[float]]) -> str:
    interval = interquartile_interval(strata)
    return "–" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
