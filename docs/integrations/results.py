"""Trains the examples of docs/integrations.md and writes their gaps into it.

    python docs/integrations/results.py docs/integrations.md

replaces what stands between `<!-- gaps -->` and `<!-- /gaps -->`. It takes about 15 minutes.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import ppo_in_one_file
import sb3_ppo
import torchrl_ppo
from results import fill

import ctrl_rl
from ctrl_rl.integrations.sb3 import actions_of
from ctrl_rl.runs.compose import compose
from ctrl_rl.runs.train import train_and_evaluate

STEPS, SEEDS = 400_000, (0, 1, 2)
EPISODES, LENGTH = 256, 20

Summaries = dict[str, dict[str, Any]]


def with_sb3(seed: int) -> Summaries:
    """Its mean action, and the actions that it draws."""
    model = sb3_ppo.train(STEPS, seed)
    drawn = actions_of(model, deterministic=False)
    torch.manual_seed(seed)
    return {
        "stable-baselines3, `sb3_ppo.py`": _measured(actions_of(model)),
        "the same, with its own noise": _measured(drawn),
    }


def with_one_file(seed: int) -> Summaries:
    """The mean action."""
    return {"`ppo_in_one_file.py`": _measured(ppo_in_one_file.train(STEPS, seed).act)}


def with_torchrl(seed: int) -> Summaries:
    """The mean action."""
    return {"TorchRL, `torchrl_ppo.py`": _measured(torchrl_ppo.train(STEPS, seed).act)}


def with_this_project(seed: int) -> Summaries:
    """Its own PPO, on the latent env."""
    with tempfile.TemporaryDirectory() as root:
        words = ["env=mixture2d", "agent=ppo", f"seed={seed}", f"run.root={root}", "logger=none"]
        words += [f"trainer.updates={STEPS // (EPISODES * LENGTH)}"]
        words += [f"trainer.batch_size={EPISODES}"]
        run = train_and_evaluate(compose("train", words), quiet=True)
        return {"`ctrl-rl train agent=ppo`": run.summary}


def _measured(act: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return ctrl_rl.evaluate_policy("mixture2d", act).summary


def main(page: Path) -> None:
    """Train, measure, write."""
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for make in (with_sb3, with_one_file, with_torchrl, with_this_project):
        for seed in SEEDS:
            start = time.perf_counter()
            for name, summary in make(seed).items():
                seconds = time.perf_counter() - start
                found.setdefault(name, []).append({**summary, "seconds": seconds})
                print(f"{name}, seed {seed}: {summary['gap_nats']:.3f} nats, {seconds:.0f} s")
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    columns = len(SEEDS) + 2
    lines = [f"| gap, nats | {seeds} | certified ≤ | KL |", "|---|" + "---:|" * columns]
    prior = [rows[0] for rows in found.values()][0]["prior"]
    lines.append(f"| the prior | {prior['gap_nats']:.2f} |" + " – |" * (columns - 2) + " 0.00 |")
    for name, rows in found.items():
        gaps = " | ".join(f"{row['gap_nats']:.2f}" for row in rows)
        most = max(row["gap_nats_certified"] for row in rows)
        kl = sum(row["kl_nats"] for row in rows) / len(rows)
        lines.append(f"| {name} | {gaps} | {most:.2f} | {kl:.2f} |")
    fill(page, "gaps", "\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
