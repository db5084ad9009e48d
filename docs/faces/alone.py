"""What the demo's run does when it is asked for one control, for both, or for nothing.

    python docs/faces/alone.py runs/demo docs/faces/README.md

fills what stands between `<!-- alone -->` and `<!-- /alone -->`.
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from torch import Tensor

from ctrl_rl import load_run
from ctrl_rl.runs import build

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import fill  # noqa: E402

SAMPLES = 512


def main(folder: Path, document: Path) -> None:
    """Measure and write."""
    run = load_run(folder)
    build.set_up_process(run.config)
    process = run.env.process
    judges = build.build_heldout(run.config, process)
    plan = replace(build.build_evaluation_plan(run.config), policy_samples=SAMPLES)
    asked = [*product(["no", "yes", "any"], repeat=len(process.controls))]
    conditions = [dict(zip(process.controls, labels, strict=True)) for labels in asked]
    evaluation = run.evaluate(plan, conditions=conditions)

    def shares(sample: Tensor) -> list[str]:
        seen = (judge.log_probabilities(sample).argmax(1) == 1 for judge in judges.values())
        return [f"{each.double().mean():.0%}" for each in seen]

    lines = [
        "| asked for | gap | 95 % interval | KL | glasses | hat |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines.append(f"| prior | – | – | 0.00 | {' | '.join(shares(evaluation.samples['prior'][0]))} |")
    for condition, name, sample in zip(
        conditions, evaluation.conditions, evaluation.samples["policy"], strict=True
    ):
        figures = evaluation.summary["per_label"][name]
        low, high = figures["gap_nats_ci"]
        places = {name: int(label) for name, label in process.check_control(condition, 1).items()}
        cells = [
            process.conditions.title(places),
            f"{figures['gap_nats']:.2f}",
            f"[{low:.2f}, {high:.2f}]",
            f"{figures['kl_nats']:.2f}",
            *shares(sample),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    fill(document, "alone", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
