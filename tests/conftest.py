"""Single-threaded tests, and the smallest pipeline that diffusers can load."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for the subprocesses too

import pytest
import torch

from ctrl_rl.composition import files

torch.set_num_threads(1)

TINY_SCHEDULER: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


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


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))
