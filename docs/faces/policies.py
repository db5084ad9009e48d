"""The same task and agent with different networks as the policy, in about the same time.

    python docs/faces/policies.py docs/faces/README.md runs/demo runs/demo_fine_tuned ...

fills what stands between `<!-- policies -->` and `<!-- /policies -->` from the runs' summaries.
"""

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import fill  # noqa: E402


def row(folder: Path) -> str:
    """A run as a row."""
    figures = json.loads((folder / "summary.json").read_text())
    config = OmegaConf.load(folder / "config.yaml")
    low, high = figures["gap_nats_ci"]
    cells = [
        f"`{config.choices.policy}`",
        config.choices.get("guidance") or "none",
        f"{parameters(folder) / 1e6:.2f}",
        f"{config.trainer.learning_rate.network:.0e}",
        f"{figures['steps']:,}",
        f"{figures['wall_s']:.0f}",
        f"{figures['gap_nats']:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{figures['kl_nats']:.2f}",
        f"{figures['heldout_accuracy']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def parameters(folder: Path) -> int:
    """How many numbers were trained: those that the optimizer has a first moment of."""
    last = sorted((folder / "checkpoints").glob("*/training.safetensors"))[-1]
    with safe_open(last, "pt") as stored:
        names = [name for name in stored.keys() if name.endswith("exp_avg")]  # noqa: SIM118
        return sum(stored.get_tensor(name).numel() for name in names)


def main(document: Path, *folders: Path) -> None:
    """Write the table."""
    lines = [
        "| policy | guidance | parameters, millions | network's rate | updates | training, s "
        "| gap | 95 % interval | KL | held-out accuracy |",
        "|---|---|" + "---:|" * 8,
        *map(row, folders),
    ]
    fill(document, "policies", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
