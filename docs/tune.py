"""Gives every agent the same three trials of its learning rates on a task; the best one is kept.

    python docs/tune.py TASK [word for `ctrl-rl train` ...] [-- word for `ctrl-rl benchmark` ...]

The trials are the task's learning rates of network and embedding times 1, 1/3 and 1/10, with seed
0, which no report uses, and 380,000 denoiser calls each, the demo's budget, evaluated with fewer
samples than a report. The smallest gap_nats counts; nothing else is tuned. Words for `ctrl-rl
train` hold for all trials.

Every finished trial is a line of docs/TASK/trials.csv, and the same command again does those that
are missing there, on this machine or on another; a line that is removed is done anew. With all of
them, configs/settings/TASK.yaml is written, the words and the best rates of every agent, for
`ctrl-rl benchmark settings=TASK`.
"""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ctrl_rl.composition import compose, files

ROOT = Path(__file__).parents[1]
FACTORS = {"1": 1.0, "1/3": 1 / 3, "1/10": 1 / 10}
CALLS = 380_000
SEED = 0
EVALUATION = [
    "evaluation.prior_samples=2048",
    "evaluation.policy_samples=64",
    "evaluation.exact_samples=0",
]
COLUMNS = ("agent", "factor", "gap_nats", "settings")

Trials = dict[tuple[str, str], dict[str, str]]


def main(task: str, *words: str) -> None:
    """Run the trials that are missing, pick, write."""
    split = words.index("--") if "--" in words else len(words)
    shared, grid_words = list(words[:split]), words[split + 1 :]
    rates = compose("train", [f"env={task}", *shared]).trainer.learning_rate
    kept = [word for word in shared if not word.startswith("trainer.learning_rate.")]
    trials = {name: kept + overrides(rates, factor) for name, factor in FACTORS.items()}
    agents = list(files("agent"))
    record = Path(__file__).parent / task / "trials.csv"
    for name, settings in trials.items():
        done = recorded(record, trials)
        left = [agent for agent in agents if (agent, name) not in done]
        if not left:
            continue
        folder = ROOT / "runs" / "tune" / name.replace("/", "_")
        grid = [f"tasks=[{task}]", f"seeds=[{SEED}]", f"denoiser_calls={CALLS}"]
        quoted = ",".join(f"'{setting}'" for setting in [*settings, *EVALUATION])
        command = [sys.executable, "-m", "ctrl_rl.cli", "benchmark", f"agents=[{','.join(left)}]"]
        command += [*grid, f"overrides=[{quoted}]", f"root={folder}", f"out={folder}/report"]
        try:
            subprocess.run([*command, *grid_words], check=False)  # a failed cell is a lost trial
        finally:  # also after Ctrl-C: what is finished counts
            gaps = {agent: gap_of(folder / task / f"{agent}-s{SEED}") for agent in left}
            for agent, gap in gaps.items():
                if gap is not None:
                    done[agent, name] = {"gap_nats": f"{gap:.4g}", "settings": " ".join(settings)}
            keep(record, done)
    done = recorded(record, trials)
    missing = [f"{a} x {name}" for a in agents for name in trials if (a, name) not in done]
    if missing:
        sys.exit(f"{len(missing)} trials are missing, {missing[0]} first; the same command goes on")
    write(task, trials, agents, done, record)


def overrides(rates: Mapping[str, float], factor: float) -> list[str]:
    """Words that multiply the rates of the policy's parameters."""
    groups = ("network", "embedding")
    return [f"trainer.learning_rate.{group}={rates[group] * factor:.2g}" for group in groups]


def gap_of(cell: Path) -> float | None:
    """Nats; infinite where the trial failed or has no finite gap, None if it is not finished."""
    if (cell / "failure.json").is_file():
        return math.inf
    if not (cell / "summary.json").is_file():
        return None
    gap = json.loads((cell / "summary.json").read_text())["gap_nats"]
    return float(gap) if gap is not None and math.isfinite(gap) else math.inf


def recorded(record: Path, trials: Mapping[str, list[str]]) -> Trials:
    """The lines of the record by agent and factor; one with other settings is refused."""
    if not record.is_file():
        return {}
    with record.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        asked = " ".join(trials.get(row["factor"], []))
        if row["settings"] != asked:
            sys.exit(f"{record}: {row['agent']} was tried with {row['settings']}, not {asked}")
    return {(row["agent"], row["factor"]): row for row in rows}


def keep(record: Path, done: Trials) -> None:
    """Write the record, agent by agent."""
    record.parent.mkdir(exist_ok=True)
    with record.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for (agent, factor), row in sorted(done.items()):
            table.writerow({**row, "agent": agent, "factor": factor})


def write(
    task: str, trials: Mapping[str, list[str]], agents: list[str], done: Trials, record: Path
) -> None:
    """One line per agent, behind it the gaps of its trials."""
    lines = [
        f"# Settings by agent on {task}, by `python docs/tune.py {task}`: the best of",
        f"# the task's rates times {', '.join(trials)}, {CALLS} denoiser calls each, seed {SEED}.",
        f"# Behind each line: gap_nats of its trials ({', '.join(trials)}).",
    ]
    for agent in agents:
        found = {name: float(done[agent, name]["gap_nats"]) for name in trials}
        best = min(found, key=lambda name: found[name])
        if not math.isfinite(found[best]):
            sys.exit(f"no trial of {agent} has a gap; remove its lines of {record} to try again")
        measured = ", ".join(f"{gap:.3g}" for gap in found.values())
        words = ", ".join(f"'{word}'" for word in trials[best])
        lines.append(f"{agent}: [{words}] # {measured}")
    path = ROOT / "configs" / "settings" / f"{task}.yaml"
    path.write_text("\n".join(lines) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
