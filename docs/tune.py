"""Gives every agent the same four trials of its learning rates and batch on a task; the best wins.

    python docs/tune.py TASK [word for `ctrl-rl train` ...] [-- word for `ctrl-rl benchmark` ...]

Three trials have the task's learning rates of network and embedding times 1, 1/3 and 1/10. The
fourth has the best of these and half the batch, so that the budget pays for twice the updates.
Each has seed 0, which no report uses, and 380,000 denoiser calls, the demo's budget, and is
evaluated with fewer samples than a report. The smallest gap_nats counts; nothing else is tuned.
Words for `ctrl-rl train` hold for all trials.

Every finished trial is a line of docs/TASK/trials.csv, and re-running the command does those that
are missing there, on this machine or on another; a line that is removed is done anew. With all of
them, configs/settings/TASK.yaml is written, the words and the best trial of every agent, for
`ctrl-rl benchmark settings=TASK`.
"""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ctrl_rl.runs.compose import compose, files

ROOT = Path(__file__).parents[1]
RATES = {"rates": 1.0, "rates/3": 1 / 3, "rates/10": 1 / 10}
BATCH = "batch/2"
TRIALS = (*RATES, BATCH)
CALLS = 380_000
SEED = 0
EVALUATION = [
    "evaluation.prior_samples=2048",
    "evaluation.policy_samples=64",
    "evaluation.exact_samples=0",
]
COLUMNS = ("agent", "trial", "gap_nats", "settings")

Record = dict[tuple[str, str], dict[str, str]]  # lines by agent and trial


def main(task: str, *words: str) -> None:
    """Do the trials that are missing, pick, write."""
    split = words.index("--") if "--" in words else len(words)
    shared, grid_words = list(words[:split]), words[split + 1 :]
    agents = list(files("agent"))
    path = Path(__file__).parent / task / "trials.csv"
    record = read(path)
    for trial in TRIALS:
        asked = {agent: settings(task, shared, agent, trial, record) for agent in agents}
        left = {agent: asked[agent] for agent in agents if (agent, trial) not in record}
        for agent in asked.keys() - left.keys():
            if record[agent, trial]["settings"] != " ".join(asked[agent]):
                sys.exit(f"{path}: {trial} of {agent} was not {' '.join(asked[agent])}")
        if left:
            record |= tried(task, trial, left, grid_words)
            write_record(path, record)
        missing = [agent for agent in agents if (agent, trial) not in record]
        if missing:
            sys.exit(f"{trial} is missing of {', '.join(missing)}; re-run the command to resume")
    write_settings(task, agents, record, path)


def settings(task: str, shared: list[str], agent: str, trial: str, record: Record) -> list[str]:
    """Words for `ctrl-rl train` of a trial."""
    trainer = compose("train", [f"env={task}", *shared]).trainer
    if trial == BATCH:
        so_far = best(agent, record, tuple(RATES))["settings"].split()
        return [*so_far, f"trainer.batch_size={trainer.batch_size // 2}"]
    kept = [word for word in shared if not word.startswith("trainer.learning_rate.")]
    rates = {name: trainer.learning_rate[name] * RATES[trial] for name in ("network", "embedding")}
    return kept + [f"trainer.learning_rate.{name}={rate:.2g}" for name, rate in rates.items()]


def tried(
    task: str, trial: str, left: Mapping[str, list[str]], grid_words: tuple[str, ...]
) -> Record:
    """Run one trial of these agents; what is finished, also after Ctrl-C."""
    folder = ROOT / "runs" / "tune" / trial.replace("/", "_")
    command = [sys.executable, "-m", "ctrl_rl", "benchmark", f"agents=[{','.join(left)}]"]
    command += [f"tasks=[{task}]", f"seeds=[{SEED}]", f"denoiser_calls={CALLS}"]
    command += [f"overrides=[{quoted(EVALUATION)}]", f"root={folder}", f"out={folder}/report"]
    command += [f"+settings.{agent}=[{quoted(words)}]" for agent, words in left.items()]
    try:
        subprocess.run([*command, *grid_words], check=False)  # a failed cell is a lost trial
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    found: Record = {}
    for agent, words in left.items():
        gap = gap_of(folder / task / f"{agent}-s{SEED}")
        if gap is not None:
            found[agent, trial] = {"gap_nats": f"{gap:.4g}", "settings": " ".join(words)}
    return found


def quoted(words: list[str]) -> str:
    """Words as elements of a list on Hydra's command line."""
    return ",".join(f"'{word}'" for word in words)


def gap_of(cell: Path) -> float | None:
    """Nats; infinite where the trial failed or has no finite gap, None if it is not finished."""
    if (cell / "failure.json").is_file():
        return math.inf
    if not (cell / "summary.json").is_file():
        return None
    gap = json.loads((cell / "summary.json").read_text())["gap_nats"]
    return float(gap) if gap is not None and math.isfinite(gap) else math.inf


def best(agent: str, record: Record, trials: tuple[str, ...]) -> dict[str, str]:
    """The line of an agent's trial with the smallest gap."""
    return min((record[agent, trial] for trial in trials), key=lambda line: float(line["gap_nats"]))


def read(path: Path) -> Record:
    """The lines of the record; none where there is no file yet."""
    if not path.is_file():
        return {}
    with path.open() as file:
        return {(row["agent"], row["trial"]): row for row in csv.DictReader(file)}


def write_record(path: Path, record: Record) -> None:
    """Write the record, agent by agent."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for agent, trial in sorted(record, key=lambda key: (key[0], TRIALS.index(key[1]))):
            table.writerow({**record[agent, trial], "agent": agent, "trial": trial})


def write_settings(task: str, agents: list[str], record: Record, source: Path) -> None:
    """One line per agent, behind it the gaps of its trials."""
    lines = [
        f"# Settings by agent on {task}, by `python docs/tune.py {task}`: the best of the task's",
        f"# rates times 1, 1/3 and 1/10, and of half the batch at the best of these; {CALLS}",
        f"# denoiser calls each, seed {SEED}. Behind each line: gap_nats of its four trials.",
    ]
    for agent in agents:
        chosen = best(agent, record, TRIALS)
        if not math.isfinite(float(chosen["gap_nats"])):
            sys.exit(f"no trial of {agent} has a gap; remove its lines of {source} to try again")
        gaps = ", ".join(f"{float(record[agent, trial]['gap_nats']):.3g}" for trial in TRIALS)
        lines.append(f"{agent}: [{quoted(chosen['settings'].split())}] # {gaps}")
    path = ROOT / "configs" / "settings" / f"{task}.yaml"
    path.write_text("\n".join(lines) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
