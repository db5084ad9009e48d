"""A trained run on a small pipeline, exported, and what its pipelines draw."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pipelines import MAKERS, SIZES, noise_like
from running import own_reward
from torch import Tensor

from ctrl_rl import load_run
from ctrl_rl.cli.main import main
from ctrl_rl.evaluation.noise import generators
from ctrl_rl.export.schedulers import FlowSDEScheduler
from ctrl_rl.runs.loaded import LoadedRun

REWARD = """
def redness(sample, control):
    wanted = control["level"].float() * (control["level"] < 2)
    return -(sample[:, 0].mean(dim=(1, 2)) - wanted).square() * (control["level"] < 2)
"""
SMALL = [
    *("env=gaussian", "prior=diffusers", "policy=low_rank", "kernel.num_steps=3"),
    *("trainer.updates=2", "trainer.batch_size=4", "trainer.learning_rate.embedding=1.0"),
    *("evaluation.prior_samples=4", "evaluation.policy_samples=3", "evaluation.exact_samples=0"),
    *("prior.prompts=[a cat, a dog]", "prior.guidance_scale=3.0"),
]


def export(
    folder: Path, kind: str, kernel: str, negative: str, *more: str
) -> tuple[LoadedRun, Path, Path]:
    """Train and export in a folder: the run, what was exported, the base model."""
    reward = own_reward(folder, REWARD, name="redness", controls="{level: 2}")
    base = MAKERS[kind](folder / kind)
    words = [
        *SMALL,
        f"prior.path={base}",
        f"kernel={kernel}",
        *(["kernel.noise_level=0.4"] if kernel == "flow_sde" else []),
        f"prior.negative_prompt='{negative}'",
        f"prior.size={SIZES.get(kind, 'null')}",
    ]
    words += [*reward, f"run.root={folder}", "run.name=run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        assert main(["train", *words, "policy.alpha=8", *more]) == 0
        words = [f"run={folder / 'run'}", f"out={folder / 'out'}", "trust=my_redness"]
        assert main(["export", *words]) == 0
        run = load_run(folder / "run", trust=["my_redness"])
    return run, folder / "out", base


def drawn(pipeline: Any, *given: Any, seed: int = 3, **named: Any) -> Tensor:
    """Images of a call whose latents and noise come from one generator each, as a run's samples."""
    texts = named["prompt_embeds"] if given[0] is None else given[0]
    n = (1 if isinstance(texts, str) else len(texts)) * named.get("num_images_per_prompt", 1)
    for _ in range(2):  # the second time shows what the first one left behind
        streams = generators(seed, n)
        if isinstance(getattr(pipeline, "scheduler", None), FlowSDEScheduler):
            pipeline.scheduler.draw = partial(noise_like, generator=streams)
        result = pipeline(*given, output_type="pt", generator=streams, **named)
    images: Tensor = result.images
    return images


def as_images(sample: Tensor) -> Tensor:
    """Samples as pipelines give images."""
    return (sample / 2 + 0.5).clamp(0, 1)
