"""Single-threaded tests, and the smallest pipeline that diffusers can load."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for the subprocesses too

import pytest
import torch

from ctrl_rl.runs.compose import files

torch.set_num_threads(1)

TINY_SCHEDULER: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}

_EXACT_REPORT = """# Agents against exact answers

How many nats the worst condition's soft return falls short of the best, seed 0, with each task's
own settings except those in `tests/agents/test_exact.py`. Written by `make science`; do not edit.

| task | best is | must be within |
|---|---|---:|
| gaussian | the closed-form optimum | 0.02 |
| gaussian_mean | the closed-form optimum at each of 16 random numbers | 0.02 |
| mixture1d | the best policy of fixed scale, by dynamic programming | 0.05 |
| mixture2d | log Z = log 1/4, which no policy of fixed scale reaches | 0.30 |
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exact-report", help="write what the exact tests measured to this file")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tabulate how far agents ended from exact answers, passed or not."""
    path = config.getoption("--exact-report")
    if not path:
        return
    found: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "failed", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "exact" and report.when == "call":
                    row = json.loads(value)
                    text = f"{row['nats']:.3f}" + ("" if outcome == "passed" else " (missed)")
                    found.setdefault(row["agent"], {})[row["task"]] = text
    tasks = ("gaussian", "gaussian_mean", "mixture1d", "mixture2d")
    lines = [
        f"| `{agent}` | {' | '.join(found[agent].get(task, '–') for task in tasks)} |"
        for agent in sorted(found)
    ]
    head = [f"| agent | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    Path(path).write_text("\n".join([_EXACT_REPORT, *head, *lines]) + "\n")


def choices(group: str) -> list[str]:
    """Names of the yamls of a config group."""
    return list(files(group))


def save_tiny_pipeline(folder: Path, **unet: Any) -> Path:
    """Write a UNet with attention on 1x4x4 latents, random weights, and its scheduler."""
    from diffusers import DDPMScheduler, UNet2DModel

    config: dict[str, Any] = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "dropout": 0.1,  # so that training mode would show
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DModel(**{**config, **unet})
    network.save_pretrained(folder / "unet")
    DDPMScheduler(**TINY_SCHEDULER).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_entropy() -> Iterator[None]:
    """Tests are the same every time: an env that is given no seed takes 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctrl_rl.envs.latent.fresh_seed", lambda: 0)
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small models on disk, made when they are first asked for."""
    import judges
    import pipelines

    folder = tmp_path_factory.mktemp("made")
    makers: dict[str, Callable[[Path], Path]] = {
        "pipeline": save_tiny_pipeline,
        "sd": pipelines.stable_diffusion,
        "sizes2": partial(judges.fitted, num_labels=2),
        "sizes4": partial(judges.fitted, num_labels=4),
        "clip": judges.clip,
        "classifier": judges.image_classifier,
        "head.pth": judges.aesthetic_head,
        "image_reward": judges.image_reward,
    }
    return cache(lambda name: makers[name](folder / name))


@pytest.fixture(scope="session")
def lora_bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small pipelines by kind, on which LoRAs are trained."""
    import pipelines

    folder = tmp_path_factory.mktemp("bases")
    return cache(lambda kind: pipelines.MAKERS[kind](folder / kind))
