"""Pictures of a benchmark: learning curves, and reward against KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_rl.benchmark.results import Result, figures_of
from ctrl_rl.benchmark.statistics import interquartile_mean

_WINDOW = 20  # curves are running means over 1 / _WINDOW of their updates
_STYLES = ("-", "--", ":", "-.")

Agents = Mapping[str, Sequence[Result]]


def draw_curves(path: Path, task: str, agents: Agents) -> None:
    """Draw the live gap of every agent against denoiser calls and against seconds.

    Methods without training are level lines at the gap of their evaluation. For agents, the line is
    the mean over seeds and the band goes from the lowest seed to the highest, both of the running
    mean over the last 5 % of updates. metrics.jsonl holds no times, to keep files of equal seeds
    equal: seconds are those of the whole training, spread evenly over its updates.

    Args:
        path: PNG to write.
        task: name of the task.
        agents: results by agent, in the order of the legend.
    """
    from matplotlib.ticker import EngFormatter

    figure = _figure(11.5, 4.2, len(agents))
    axes = figure.subplots(1, 2, sharey=True)
    lowest, starts = 0.0, []
    for agent, results in agents.items():
        done = [result for result in results if result.summary]
        if not done:
            continue
        if not done[0].metrics():  # no training
            gap, look = done[0].summary["gap_nats"], _style(agent, agents)
            for axis in axes:
                axis.axhline(gap, label=f"{agent} (no training)", **look)
            lowest = min(lowest, gap)
            continue
        calls, gaps = _curves(done)
        seconds = interquartile_mean(figures_of(done, "wall_s"))
        times = seconds * np.arange(1, len(calls) + 1) / len(calls)
        for axis, across in zip(axes, (calls, times), strict=True):
            line = axis.plot(across, gaps.mean(0), label=agent, **_style(agent, agents))
            band = {"color": line[0].get_color(), "alpha": 0.15, "linewidth": 0}
            axis.fill_between(across, gaps.min(0), gaps.max(0), **band)
        lowest = min(lowest, float(gaps.min()))
        starts += [float(gaps[:, 0].max())]
    prior = _first(agents)["prior"]["gap_nats"]
    for axis, label in zip(axes, ("denoiser calls", "seconds (spread evenly)"), strict=True):
        axis.axhline(prior, color="gray", linestyle=":", linewidth=1, label="prior")
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    # A diverging curve leaves the picture at the top instead of flattening the others.
    axes[0].set_ylim(1.1 * lowest - 0.02 * prior, 1.15 * max([prior, *starts]))
    axes[0].set_ylabel("gap on the training batch, nats")
    figure.suptitle(f"{task}: mean over seeds, band from lowest to highest seed", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_pareto(path: Path, task: str, agents: Agents) -> None:
    """Draw reward against KL, one point per cell, and the Pareto front.

    No policy lies above the line reward = KL + log Z, and the exact conditional lies on it. Cells
    that ended with twice the prior's gap or more are left out but counted in the legend.

    Args:
        path: PNG to write.
        task: name of the task.
        agents: results by agent, in the order of the legend.
    """
    figure = _figure(7.5, 4.5, len(agents))
    axis = figure.subplots()
    summary = _first(agents)
    points = [(0.0, summary["prior"]["reward"])]
    diverged = 2 * summary["prior"]["gap_nats"]
    for agent, results in agents.items():
        done = [r.summary for r in results if r.summary]
        inside = [(s["kl_nats"], s["reward"]) for s in done if s["gap_nats"] < diverged]
        if done:
            color, marker = _style(agent, agents)["color"], "ovD^"[_place(agent, agents) // 10 % 4]
            look = {"color": color, "marker": marker, "s": 28, "alpha": 0.8}
            outside = len(done) - len(inside)
            label = f"{agent} ({outside} outside)" if outside else agent
            axis.scatter([kl for kl, _ in inside], [r for _, r in inside], label=label, **look)
            points += inside
    front = pareto_front(points)
    axis.step(*zip(*front, strict=True), where="post", color="gray", linewidth=1, label="front")
    axis.scatter(*points[0], marker="s", color="black", label="prior", zorder=3)
    exact, log_z = summary.get("exact"), summary["log_z"]
    if exact and exact.get("kl_nats") is not None:
        where = (exact["kl_nats"], exact["reward"])
        axis.scatter(*where, marker="*", s=140, color="black", label="exact", zorder=3)
        points.append(where)
    heights = [reward for _, reward in points]
    room = 0.08 * (max(heights) - min(heights)) + 1e-3
    right = 1.05 * max(kl for kl, _ in points) + 1e-3
    axis.plot((0, right), (log_z, right + log_z), "k--", linewidth=0.8, label="KL + log Z")
    axis.set_xlim(-0.03 * right, right)
    axis.set_ylim(min(heights) - room, max(heights) + room)
    axis.set_xlabel("KL to the prior, nats")
    axis.set_ylabel("reward, nats")
    axis.set_title(f"{task}: reward bought with KL", fontsize=11)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (KL, reward) pairs for which no other has less KL and as much reward, by rising KL."""
    front: list[tuple[float, float]] = []
    for kl, reward in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or reward > front[-1][1]:
            front.append((kl, reward))
    return front


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` entries (fewer at the start) at every entry [N]."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    smoothed: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed


def _curves(done: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Denoiser calls [T] and smoothed gaps [seeds, T]; the shortest seed decides T."""
    runs = [result.metrics() for result in done]
    length = min(len(lines) for lines in runs)
    calls = np.asarray([line["denoiser_calls"] for line in runs[0][:length]], dtype=float)
    gaps = np.asarray(
        [[line["gap_nats"] for line in lines[:length]] for lines in runs], dtype=float
    )
    window = max(1, length // _WINDOW)
    return calls, np.stack([running_mean(row, window) for row in gaps])


def _first(agents: Agents) -> dict[str, Any]:
    """Any summary of the task: all have the same prior, exact and log Z."""
    return next(r.summary for results in agents.values() for r in results if r.summary)


def _style(agent: str, agents: Agents) -> dict[str, Any]:
    """Ten colours, then the same with other lines; an agent looks the same in every task."""
    place = _place(agent, agents)
    return {"color": f"C{place % 10}", "linestyle": _STYLES[place // 10 % 4], "linewidth": 1.5}


def _place(agent: str, agents: Agents) -> int:
    return sorted(agents).index(agent)


def _figure(width: float, height: float, agents: int) -> Any:
    """An empty figure, in inches, at least as high as a legend of all agents."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    legend = 0.2 * (agents + 5)  # lines of 9 points, and entries that are not agents
    figure = Figure(figsize=(width, max(height, legend)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
