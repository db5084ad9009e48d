"""PPO on the size of images as JPEG files: the paper's first task on a small Stable Diffusion."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pipelines
import torch
from torch import Tensor

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.rewards.jpeg import jpeg_kilobytes

SEEDS = (0, 1, 2)
PROMPT = "a fox"  # not among those of training
# kB, negative as in the paper: the prior's mean size, and 1.7 standard deviations on either side.
EDGES = (-5.0, -4.87, -4.74)
SETTINGS = (
    *("env=sd_compressibility", "reward=jpeg", "agent=ppo", "env.guidance_strength=10"),
    *(f"reward.classifiers.size.edges={list(EDGES)}", "reward.classifiers.size.std=0.04"),
    *("prior.prompts=[a cat,a dog]", f"prior.evaluation_prompts=[{PROMPT}]"),
    # Three steps while there is much noise, then the read-out. Where a step has little of it, what
    # a policy changes there costs most nats and changes sizes least.
    *("prior.guidance_scale=1", "kernel=ddpm", "kernel.num_steps=3"),
    *("kernel.timesteps=[951,851,751,651]", "trainer.batch_size=128", "trainer.updates=300"),
    *("trainer.learning_rate.network=3e-3", "trainer.learning_rate.embedding=1e-1"),
    *("~evaluation.heldout.size", "evaluation.prior_samples=256", "evaluation.policy_samples=64"),
    *("evaluation.exact_samples=0", "evaluation.batch_size=64"),
)


# Of what decides the prior and the runs, so that finished ones of other settings are not taken.
DIGEST = hashlib.sha256(
    repr(SETTINGS).encode() + Path(pipelines.__file__).read_bytes()
).hexdigest()[:8]


def pipeline(folder: Path) -> Path:
    """The prior's folder, made where it is not there yet."""
    if (folder / "model_index.json").is_file():
        return folder
    return pipelines.stable_diffusion(folder, vae=pipelines.vivid_autoencoder)


def trained(root: Path, prior: Path, seed: int) -> Path:
    """The folder of a finished run; one that is there already is kept."""
    run = root / f"seed{seed}"
    if not (run / "summary.json").is_file():
        where = [f"prior.path={prior}", f"run.root={root}", f"run.name={run.name}"]
        assert main(["train", *SETTINGS, *where, "run.overwrite=true", f"seed={seed}"]) == 0
    return run


@dataclass(frozen=True)
class Sizes:
    """Sizes of one class, in kB: of the prior's images and, with the same noise, the policy's."""

    label: int
    prior: Tensor
    policy: Tensor

    @property
    def asked(self) -> int:
        """Which way the class lies: 1 for larger files, -1 for smaller ones."""
        return 1 if self.label < len(EDGES) / 2 else -1

    @property
    def moved(self) -> float:
        """Mean difference, in kB."""
        return float((self.policy - self.prior).mean())

    @property
    def error(self) -> float:
        """Its standard error."""
        change = self.policy - self.prior
        return float(change.std()) / math.sqrt(len(change))

    def share(self, sizes: Tensor) -> float:
        """Of sizes, which are in the class."""
        edges = torch.tensor(EDGES)
        return float((torch.bucketize(-sizes, edges, right=True) == self.label).float().mean())


def measured(run: Path, n: int = 256) -> Sequence[Sizes]:
    """Sizes of every class on a prompt that training has not seen."""
    loaded = load_run(run)

    def sizes(label: int, strength: float) -> Tensor:
        control = {"prompt": PROMPT, "size": label}
        return jpeg_kilobytes(loaded.sample(control, n=n, seed=5, strength=strength))

    labels = range(len(EDGES) + 1)
    return [Sizes(label, sizes(label, 0.0), sizes(label, 1.0)) for label in labels]
