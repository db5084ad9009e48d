"""How far an agent ends from the best soft return of a task with an exact answer, per label.

    python docs/exact.py TASK AGENT [override ...]

TASK is gaussian (against the closed-form optimum), mixture1d (against the best policy of fixed
scale) or mixture2d (against log Z = log 1/4, which no policy of fixed scale reaches). Trains with
the task's own settings and seed 0 unless overrides say otherwise. The oracles are the tests' own.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from exact_tasks import gaussian_oracle, prior_means, reward_of, scales  # noqa: E402
from learning import trained  # noqa: E402
from oracles import fixed_scale_floor_1d  # noqa: E402

from ctrl_rl.envs.process import DenoisingProcess  # noqa: E402
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate  # noqa: E402


def best(task: str, process: DenoisingProcess, label: int) -> float:
    """The best soft return of one label, nats."""
    if task == "gaussian":
        return gaussian_oracle(process, label).optimal_soft_return
    if task == "mixture1d":
        *means, read_out = prior_means(process)
        reward = reward_of(process, "group", label)
        return fixed_scale_floor_1d(means, scales(process), reward, read_out).start_value
    return math.log(1 / 4)


def main(task: str, agent: str, *words: str) -> None:
    """Train, evaluate, print."""
    torch.set_num_threads(1)
    policy, process = trained(task, agent, *words)
    plan = EvaluationPlan(prior_samples=2, policy_samples=20_000, exact_samples=0, batch_size=4096)
    rows = evaluate(process, policy, plan).summary["per_label"].items()
    for label, (name, row) in enumerate(rows):
        short = best(task, process, label) - row["soft_return"]
        print(f"{task} {agent} {name}: {short:.4f} nats short")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("gaussian", "mixture1d", "mixture2d"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
