"""Writes each agent's result of a benchmark report into the pages of docs/agents.

    python docs/result_rows.py docs/digits/results.csv

replaces what stands between `<!-- digits -->` and `<!-- /digits -->` in every page (digits is the
task of the rows), in docs/agents/README.md, where the table of all agents goes, and in
docs/agents/which.md, where that of their families goes.
"""

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

from results import fill

from ctrl_rl.benchmark.statistics import interquartile_interval, interquartile_mean

PAGES = Path(__file__).parent / "agents"
SHARED = {"ppo_critic": "ppo"}  # agents that are described on another agent's page
FAMILIES = {  # what agents learn from: what they need of the reward, and who they are
    "the reward's gradient through the whole chain": ("ctrl", "alignprop", "h_transform"),
    "gradients carried back step by step": ("nabla_db", "adjoint"),
    "the reward's gradient through some last steps": ("refl", "draft", "draft_lv"),
    "consistency of whole trajectories": ("pcl", "tb", "vargrad"),
    "policy gradients": ("reinforce", "dpok", "ppo", "ppo_critic", "grpo"),
    "weighted regression, preferences": ("rwr", "nft", "d3po"),
    "consistency of single steps": ("db", "subtb"),
    "a critic's gradient": ("sac",),
}

Rows = list[dict[str, str]]


def main(path: Path) -> None:
    """Read the report, fill the pages."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["gap_nats"]]
    (task,) = {row["task"] for row in rows}
    agents: dict[str, Rows] = {}
    for row in rows:
        agents.setdefault(row["agent"], []).append(row)
    ranked = dict(sorted(agents.items(), key=lambda entry: mean(entry[1], "gap_nats")))
    report = f"{path.parent.name}/report.md"
    pages: dict[str, list[str]] = {}
    for place, (agent, found) in enumerate(ranked.items(), start=1):
        line = sentence(task, agent, found, f"place {place} of {len(ranked)}", f"../{report}")
        pages.setdefault(SHARED.get(agent, agent), []).append(line)
    for page, lines in pages.items():
        fill(PAGES / f"{page}.md", task, "\n\n".join(lines))
    fill(PAGES / "README.md", task, table(ranked))
    fill(PAGES / "which.md", task, families(ranked, prior_gap(path)))


def prior_gap(path: Path) -> float:
    """The prior's own gap."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["prior_gap_nats"]]
    return interquartile_mean([float(row["prior_gap_nats"]) for row in rows])


def families(ranked: Mapping[str, Rows], prior: float) -> str:
    """Gaps by what agents learn from, the best family first."""
    unknown = set(ranked) - {agent for members in FAMILIES.values() for agent in members}
    if unknown:
        sys.exit(f"to which family of FAMILIES belongs {', '.join(sorted(unknown))}?")
    gaps = {agent: mean(rows, "gap_nats") for agent, rows in ranked.items()}
    lines = ["| learns from | gap on digits, best first |", "|---|---|"]
    found = {
        family: sorted((agent for agent in members if agent in gaps), key=gaps.__getitem__)
        for family, members in FAMILIES.items()
    }
    rows = {f"| nothing: the prior | {prior:.2f} |": prior}
    for family, members in found.items():
        if members:
            shown = ", ".join(f"`{agent}` {gaps[agent]:.2f}" for agent in members)
            rows[f"| {family} | {shown} |"] = gaps[members[0]]
    return "\n".join([*lines, *sorted(rows, key=rows.__getitem__)])


def mean(rows: Rows, figure: str) -> float:
    """Interquartile mean over seeds, as in the report."""
    return interquartile_mean([float(row[figure]) for row in rows])


def interval(rows: Rows) -> str:
    """Bootstrap interval of the gap over seeds, as in the report; a dash for a single seed.

    Of three seeds or fewer it is the range.
    """
    found = interquartile_interval([[float(row["gap_nats"]) for row in rows]])
    return f"[{found[0]:.2f}, {found[1]:.2f}]" if found else "–"


def sentence(task: str, agent: str, rows: Rows, place: str, report: str) -> str:
    """What came out for one agent."""
    return (
        f"**Result.** `{agent}` on {task}, {len(rows)} seeds, "
        f"{mean(rows, 'denoiser_calls'):,.0f} denoiser calls, tuned rates and batch: gap "
        f"{mean(rows, 'gap_nats'):.2f} {interval(rows)} nats, held-out accuracy "
        f"{mean(rows, 'heldout_accuracy'):.2f}, KL {mean(rows, 'kl_nats'):.2f} nats; {place} "
        f"([report]({report}))."
    )


def table(ranked: Mapping[str, Rows]) -> str:
    """All agents, the smallest gap first."""
    columns = ("agent", "gap", "over seeds", "held-out accuracy", "KL", "wall s")
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for agent, rows in ranked.items():
        page = SHARED.get(agent, agent)
        cells = [f"[`{agent}`]({page}.md)", f"{mean(rows, 'gap_nats'):.2f}", interval(rows)]
        cells += [f"{mean(rows, 'heldout_accuracy'):.2f}", f"{mean(rows, 'kl_nats'):.2f}"]
        lines.append("| " + " | ".join([*cells, f"{mean(rows, 'wall_s'):.0f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
