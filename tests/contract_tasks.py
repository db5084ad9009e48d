"""Tasks on which the contract tests try a yaml, and the values that yamls leave open."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from conftest import choices
from omegaconf import DictConfig
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.composition import compose
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.process import DenoisingProcess

K = 4
OPEN = {
    ("control_law", "fixed"): {"label": 1},
    ("control_law", "weighted"): {"probabilities": [0.5, 0.0, 0.2, 0.3]},
    ("prior", "diffusers"): {"path": "MADE:pipeline"},
    ("reward", "aesthetic"): {
        "classifiers.aesthetic.measure.head": "MADE:head.pth",
        "classifiers.aesthetic.measure.path": "MADE:clip",
    },
    ("reward", "clip"): {
        "classifiers.text.texts": "[a drawing, a photograph, a word]",
        "classifiers.text.path": "MADE:clip",
    },
    ("reward", "image_classifier"): {"classifiers.label.path": "MADE:classifier"},
    ("policy", "low_rank"): {"targets": "[conv1,conv2]"},
}
# What a choice needs of other groups.
WORDS = {("kernel", "flow_sde"): ["prior.scheduler.prediction_type=flow_prediction"]}
TASKS = {  # whose prior has layers to adapt, and whose samples are images
    ("policy", "low_rank"): "digits",
    **{("reward", name): "digits" for name in ("aesthetic", "clip", "image_classifier", "jpeg")},
}
# What the builder gives to a `_partial_` node of the group.
GIVEN = {
    "agent": {"task"},
    "kernel": {"scheduler_config"},
    "policy": {"prior", "kernel", "controls"},
}
GROUPS = ("agent", "control_law", "kernel", "policy", "prior", "reward")


@cache
def task_with(group: str, name: str) -> str:
    """The first task that uses a choice; the mixture where none does."""
    if (group, name) in TASKS:
        return TASKS[group, name]
    if group == "prior":
        return "gaussian"  # whose reward reads nothing of the prior's config
    for task in ("mixture2d", *choices("env")):
        if compose("train", [f"env={task}"]).choices[group] == name:
            return task
    return "mixture2d"


def config_of(group: str, name: str, made: Callable[[str], Path] | None = None) -> DictConfig:
    """The config of a choice; `made` gives the small models that "MADE:" asks for."""
    values = dict(OPEN.get((group, name), {}))
    for key, value in values.items():
        if made and str(value).startswith("MADE:"):
            values[key] = made(str(value).removeprefix("MADE:"))
    given = [f"++{group}.{key}={value}" for key, value in values.items()]
    task = task_with(group, name)
    config: DictConfig = compose(
        "train",
        [f"env={task}", f"{group}={name}", f"kernel.num_steps={K}", *given]
        + WORDS.get((group, name), []),
    )
    return config


def permuted(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def samples(process: DenoisingProcess, n: int) -> Tensor:
    """Plausible clean samples: the prior's own."""
    env = LatentEnv(process, num_envs=n, seed=1)
    result: Tensor = env.rollout(K)["next", keys.SAMPLE][:, -1]
    return result.detach()
