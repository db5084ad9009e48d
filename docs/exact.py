"""How far an agent ends from the best soft return of a task with an exact answer, per label.

    python docs/exact.py TASK AGENT [override ...]

TASK is gaussian (against the closed-form optimum), mixture1d (against the best policy of fixed
scale) or mixture2d (against log Z = log 1/4, which no policy of fixed scale reaches). Trains with
the task's own settings and seed 0 unless overrides say otherwise. The oracles are the tests' own.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from exact_answers import shortfalls  # noqa: E402


def main(task: str, agent: str, *words: str) -> None:
    """Train, evaluate, print."""
    torch.set_num_threads(1)
    for label, nats in shortfalls(task, agent, *words).items():
        print(f"{task} {agent} {label}: {nats:.4f} nats short")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("gaussian", "mixture1d", "mixture2d"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
