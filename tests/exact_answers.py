"""How far trained agents end from the best soft return of a task with an exact answer."""

import math

from batches import trained
from exact_tasks import gaussian_oracle, prior_means, reward_of, scales
from oracles import fixed_scale_floor_1d

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.evaluation.evaluate import EvaluationPlan, evaluate
from ctrl_rl.evaluation.samplers import PolicySampler


def best_soft_return(task: str, process: DenoisingProcess, asked: float) -> float:
    """The best soft return of a value of the task's only control, nats.

    The closed form on gaussian and gaussian_mean; that of the best policy of fixed scale on
    mixture1d; log Z on mixture2d, log 1/4 by symmetry, which no policy of fixed scale reaches.
    """
    if task.startswith("gaussian"):
        return gaussian_oracle(process, asked).optimal_soft_return
    if task == "mixture1d":
        *means, read_out = prior_means(process)
        reward = reward_of(process, "group", int(asked))
        return fixed_scale_floor_1d(means, scales(process), reward, read_out).start_value
    return math.log(1 / 4)


def shortfalls(task: str, agent: str, *words: str) -> dict[str, float]:
    """Train with the task's settings and overrides: nats short of the best, by condition.

    Every label of a control, or 16 numbers that are drawn at random.
    """
    policy, process = trained(task, agent, *words)
    plan = EvaluationPlan(
        prior_samples=2,
        policy_samples=20_000,
        exact_samples=0,
        batch_size=4096,
        most_conditions=16,
    )
    rows = evaluate(PolicySampler(process, policy), plan).summary["per_label"].items()
    return {
        name: best_soft_return(task, process, *asked.values()) - row["soft_return"]
        for asked, (name, row) in zip(plan.conditions_of(process), rows, strict=True)
    }
