"""Gives every agent the same three trials of its learning rates on a task; the best one is kept.

    python docs/tune.py TASK [word for `ctrl-rl train` ...] [-- word for `ctrl-rl benchmark` ...]

The trials are the task's learning rates of network and embedding times 1, 1/3 and 1/10, with seed
0, which no report uses, and 266,000 denoiser calls each, the demo's budget, evaluated with fewer
samples than a report. The smallest gap_nats counts; nothing else is tuned. Words for `ctrl-rl
train` hold for all trials. Runs lie in runs/tune; the same command again skips what is there.
Writes configs/settings/TASK.yaml, those words and the best rates of every agent with the gaps of
all trials behind them, for `ctrl-rl benchmark settings=TASK`.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from ctrl_rl.composition import compose

ROOT = Path(__file__).parents[1]
FACTORS = {"1": 1.0, "1/3": 1 / 3, "1/10": 1 / 10}
CALLS = 266_000
SEED = 0
EVALUATION = [
    "evaluation.prior_samples=2048",
    "evaluation.policy_samples=64",
    "evaluation.exact_samples=0",
]


def main(task: str, *words: str) -> None:
    """Run the trials, pick, write."""
    split = words.index("--") if "--" in words else len(words)
    shared, grid_words = list(words[:split]), words[split + 1 :]
    rates = compose("train", [f"env={task}", *shared]).trainer.learning_rate
    trials = {name: shared + overrides(rates, factor) for name, factor in FACTORS.items()}
    gaps: dict[str, dict[str, float]] = {}
    for name, settings in trials.items():
        folder = ROOT / "runs" / "tune" / name.replace("/", "_")
        grid = [f"tasks=[{task}]", f"seeds=[{SEED}]", f"denoiser_calls={CALLS}"]
        quoted = ",".join(f"'{setting}'" for setting in [*settings, *EVALUATION])
        subprocess.run(
            [*(sys.executable, "-m", "ctrl_rl.cli", "benchmark", *grid, f"overrides=[{quoted}]")]
            + [f"root={folder}", f"out={folder}/report", *grid_words],
            check=False,  # a cell that failed is a trial that lost
        )
        for cell in sorted((folder / task).glob(f"*-s{SEED}")):
            agent = cell.name.removesuffix(f"-s{SEED}")
            gaps.setdefault(agent, {})[name] = gap_of(cell)
    if not gaps:
        sys.exit("no trial was made; see what ctrl-rl benchmark said above")
    write(task, trials, gaps)


def overrides(rates: dict[str, float], factor: float) -> list[str]:
    """Words that multiply the rates of the policy's parameters."""
    groups = ("network", "embedding")
    return [f"trainer.learning_rate.{group}={rates[group] * factor:.2g}" for group in groups]


def gap_of(cell: Path) -> float:
    """Nats, infinite where the trial failed or its gap is not finite."""
    if (cell / "failure.json").is_file():
        return math.inf
    if not (cell / "summary.json").is_file():
        sys.exit(f"{cell} is not finished; the same command goes on with it")
    gap = json.loads((cell / "summary.json").read_text())["gap_nats"]
    return gap if gap is not None and math.isfinite(gap) else math.inf


def write(task: str, trials: dict[str, list[str]], gaps: dict[str, dict[str, float]]) -> None:
    """One line per agent, behind it the gaps of its trials."""
    lines = [
        f"# Learning rates by agent on {task}, by `python docs/tune.py {task}`: the best of",
        f"# the task's rates times {', '.join(trials)}, {CALLS} denoiser calls each, seed {SEED}.",
        f"# Behind each line: gap_nats of its trials ({', '.join(trials)}).",
    ]
    for agent, found in sorted(gaps.items()):
        if found.keys() != trials.keys():
            sys.exit(f"{agent} has only the trials {', '.join(found)}; the same command goes on")
        best = min(found, key=lambda name: found[name])
        if not math.isfinite(found[best]):
            sys.exit(f"no trial of {agent} has a gap; look at runs/tune/*/{task}/{agent}-s{SEED}")
        measured = ", ".join(f"{found[name]:.3g}" for name in trials)
        lines.append(f"{agent}: [{', '.join(trials[best])}] # {measured}")
    path = ROOT / "configs" / "settings" / f"{task}.yaml"
    path.write_text("\n".join(lines) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
