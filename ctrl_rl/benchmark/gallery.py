"""The benchmark picture that people look at first: samples of every agent, one row each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ctrl_rl.benchmark.grid import Cell
from ctrl_rl.benchmark.results import Result
from ctrl_rl.evaluation.pictures import draw_table
from ctrl_rl.runs.build import build_evaluation_plan, set_up_process
from ctrl_rl.runs.loaded import LoadedRun, load_run
from ctrl_rl.runs.progress import bar
from ctrl_rl.runs.trust import own_modules

_IMAGES, _POINTS = 3, 500  # samples per set
_MOST = 12  # conditions with a column

Agents = Mapping[str, Sequence[Result]]


def draw_gallery(path: Path, task: str, agents: Agents) -> None:
    """Draw samples of every agent's best seed, between the exact conditional and the prior.

    Columns are the first twelve conditions. Samples are drawn anew from the runs' weights, with the
    same noise for all agents.

    Args:
        path: PNG to write.
        task: name of the task.
        agents: results by agent, in the order of the rows; at least one is finished.
    """
    best = {
        agent: min(finished, key=lambda result: result.summary["gap_nats"])
        for agent, results in agents.items()
        if (finished := [result for result in results if result.summary])
    }
    with bar("samples", len(best)) as report:
        run = _load(next(iter(best.values())).cell)
        set_up_process(run.config)  # as the cells do: threads beyond spare cores wait on each other
        process = run.env.process
        count = _IMAGES if len(process.sample_shape) == 3 else _POINTS
        conditions = build_evaluation_plan(run.config).conditions_of(process)[:_MOST]
        headings, exact, prior = _references(run, count)
        rows: dict[str, list[Tensor]] = {"exact, 0": exact} if exact else {}
        for done, (agent, result) in enumerate(best.items(), start=1):
            run = _load(result.cell)
            rows[f"{agent}, {result.summary['gap_nats']:.3g}"] = [
                run.sample(condition, n=count, seed=seed)
                for seed, condition in enumerate(conditions)
            ]
            report(done, {})
    draw_table(
        path,
        rows={**rows, "prior": prior},
        headings=headings,
        title=f"{task}: best seed of each agent, with its gap in nats",
        count=count,
    )


def _references(run: LoadedRun, count: int) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names of conditions; samples of the exact conditional, none if unknown, and of the prior."""
    plan = build_evaluation_plan(run.config)
    plan = replace(plan, policy_samples=3, exact_samples=min(count, plan.exact_samples))
    drawn = run.evaluate(plan)
    # A prior that does not see the control has one set of samples; each column shows other ones.
    prior = [sample.roll(-count * i, 0)[:count] for i, sample in enumerate(drawn.samples["prior"])]
    return drawn.conditions[:_MOST], drawn.samples.get("exact", [])[:_MOST], prior[:_MOST]


def _load(cell: Cell) -> LoadedRun:
    """The run of a cell; the grid itself named the user's modules in it."""
    return load_run(cell.folder, trust=own_modules(cell.config))
