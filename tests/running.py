"""Small runs for tests of the trainer, the run folder and the command line."""

import json
import shutil
from pathlib import Path

from ctrl_rl.cli.main import main

SMALL = [
    "env=gaussian",
    "logger=none",
    "trainer.updates=12",
    "trainer.batch_size=16",
    "trainer.checkpoint_every=5",
    "trainer.log_z_samples=32",
    "evaluation.prior_samples=32",
    "evaluation.policy_samples=16",
    "evaluation.exact_samples=8",
]


def train(root: Path, name: str = "run", *words: str) -> Path:
    """Train a small run to its end; returns its folder."""
    assert main(["train", *SMALL, f"run.root={root}", f"run.name={name}", *words]) == 0
    return root / name


def contents(run: Path) -> dict[str, bytes]:
    """What two equal runs share byte for byte: metrics, final weights and training state."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    files = [run / "metrics.jsonl", newest / "policy.safetensors", newest / "training.safetensors"]
    return {file.name: file.read_bytes() for file in files} | {"at": newest.name.encode()}


def interrupt(run: Path) -> None:
    """Leave a finished run as if killed before its last checkpoint."""
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    (run / "summary.json").unlink()


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in summary.json")

    return json.loads((run / "summary.json").read_text(), parse_constant=refuse)


def own_reward(
    folder: Path, code: str, *, name: str, controls: str = "{}", differentiable: bool = True
) -> list[str]:
    """Write a module and a yaml as a user has them; the words that choose them.

    The module's function is called as the reward is; the folder must be on the path of imports.
    """
    (folder / f"my_{name}.py").write_text(code)
    (folder / "mine" / "reward").mkdir(parents=True)
    (folder / "mine" / "reward" / f"{name}.yaml").write_text(
        f"_target_: ctrl_rl.rewards.FunctionReward\nfunction: my_{name}.{name}\n"
        f"controls: {controls}\ndifferentiable: {str(differentiable).lower()}\nupper_bound: 0.0\n"
    )
    return [f"--config-dir={folder / 'mine'}", f"reward={name}"]
