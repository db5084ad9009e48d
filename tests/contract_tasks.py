"""Tasks on which the contract tests try a yaml, and the values that yamls leave open."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from conftest import choices
from omegaconf import DictConfig
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.controls import Continuous
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.runs.compose import compose

K = 4
Made = Callable[[str], Path]
# What yamls leave open, and what a choice needs of other groups; "MADE:x" is a small model on disk.
OPEN = {
    ("control_law", "fixed"): ["++control_law.label=1"],
    ("control_law", "weighted"): ["++control_law.probabilities=[0.5,0.0,0.2,0.3]"],
    ("kernel", "flow_sde"): ["prior.scheduler.prediction_type=flow_prediction"],
    ("prior", "animals"): ["prior.path=MADE:sd"],
    ("prior", "diffusers"): ["prior.path=MADE:pipeline"],
    ("reward", "clip_score"): ["reward.score.path=MADE:clip"],
    ("reward", "hps"): ["reward.score.path=MADE:clip"],
    ("reward", "image_reward"): [
        "reward.score.weights=MADE:image_reward",
        "reward.score.tokenizer=MADE:image_reward",
    ],
    ("reward", "packaged_score"): [
        "reward.score.target=judges.Scorer",
        "reward.score.path=anywhere",
    ],
    ("reward", "pick_score"): [
        "reward.score.path=MADE:clip",
        "reward.score.processor=MADE:clip",
    ],
    ("reward", "weighted_sum"): [
        "reward.rewards={size: {_target_: ctrl_rl.rewards.ClassifierReward, classifiers: "
        "{size: {_target_: ctrl_rl.classifiers.classifier.Classifier.load, folder: MADE:sizes4}}}, "
        "fit: {_target_: ctrl_rl.rewards.PromptReward, score: "
        "{_target_: ctrl_rl.rewards.ClipScore, path: MADE:clip}}}",
    ],
    ("reward", "aesthetic"): [
        "reward.classifiers.aesthetic.measure.head=MADE:head.pth",
        "reward.classifiers.aesthetic.measure.path=MADE:clip",
    ],
    ("reward", "clip"): [
        "reward.classifiers.text.texts=[a drawing,a photograph,a word]",
        "reward.classifiers.text.path=MADE:clip",
    ],
    ("reward", "image_classifier"): ["reward.classifiers.label.path=MADE:classifier"],
    ("reward", "sd_compressibility"): ["reward.classifiers.size.folder=MADE:sizes4"],
    ("reward", "sd_multitask"): [
        "reward.classifiers.size.folder=MADE:sizes2",
        "reward.classifiers.aesthetic.measure.head=MADE:head.pth",
        "reward.classifiers.aesthetic.measure.path=MADE:clip",
    ],
    ("policy", "low_rank"): ["++policy.targets=[conv1,conv2]"],
}
SMALL = [  # of tasks on Stable Diffusion
    *("prior.path=MADE:sd", "prior.prompts=[ant,bee]", "prior.evaluation_prompts=[cat]"),
    f"kernel.num_steps={K}",
]
TASK_WORDS = {
    f"sd_{name}": [*SMALL, *OPEN["reward", reward]]
    for name, reward in {
        "aesthetic": "aesthetic",
        "compressibility": "sd_compressibility",
        "multitask": "sd_multitask",
    }.items()
}
TASK_WORDS["images"] = [
    "prior.path=MADE:pipeline",
    "reward=image_classifier",
    *OPEN["reward", "image_classifier"],
    f"kernel.num_steps={K}",
]
TASKS = {  # whose prior has layers to adapt, and whose samples are images
    ("policy", "low_rank"): "digits",
    **{("reward", name): "digits" for name in ("aesthetic", "clip", "image_classifier", "jpeg")},
    # Scores for prompts.
    **{("reward", name): "sd_aesthetic" for name in ("clip_score", "hps", "pick_score")},
    **{("reward", name): "sd_aesthetic" for name in ("image_reward", "packaged_score")},
    ("reward", "weighted_sum"): "sd_aesthetic",
}
# What the builder gives to a `_partial_` node of the group.
GIVEN = {
    "agent": {"task"},
    "guidance": {"policy", "value"},
    "kernel": {"scheduler_config"},
    "method": {"process"},
    "policy": {"prior", "kernel", "controls"},
}
GROUPS = ("agent", "control_law", "guidance", "kernel", "method", "policy", "prior", "reward")


def words_of_task(task: str, made: Made | None = None) -> list[str]:
    """What a task on a model from elsewhere needs to run on a small one here."""
    return filled(TASK_WORDS.get(task, []), made)


def filled(words: list[str], made: Made | None) -> list[str]:
    """Words with the paths of small models, made now; unfilled they can only be composed."""
    if made is None:
        return words
    return [re.sub(r"MADE:([\w.]+)", lambda found: str(made(found[1])), word) for word in words]


@cache
def task_with(group: str, name: str) -> str:
    """The first task that uses a choice; the mixture where none does."""
    if (group, name) in TASKS:
        return TASKS[group, name]
    if group == "prior":
        return "gaussian"  # whose reward reads nothing of the prior's config
    small = [task for task in choices("env") if group == "reward" or task not in TASK_WORDS]
    for task in ("mixture2d", *small):
        if compose("train", [f"env={task}", *words_of_task(task)]).choices[group] == name:
            return task
    return "mixture2d"


def config_of(group: str, name: str, made: Made | None = None) -> DictConfig:
    """The config of a choice; `made` gives the small models that it asks for."""
    task = task_with(group, name)
    replaced = group == "reward" and task in TASK_WORDS and (group, name) in TASKS
    of_task = filled(SMALL, made) if replaced else words_of_task(task, made)
    words = [*of_task, f"{group}={name}", f"kernel.num_steps={K}"]
    config: DictConfig = compose(
        "train", [f"env={task}", *words, *filled(OPEN.get((group, name), []), made)]
    )
    return config


def permuted(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def samples(process: DenoisingProcess, n: int) -> Tensor:
    """Plausible clean samples: the prior's own."""
    env = LatentEnv(process, num_envs=n, seed=1)
    result: Tensor = env.rollout(K)["next", keys.SAMPLE][:, -1]
    return result.detach()


def some_values(process: DenoisingProcess, n: int) -> dict[str, Tensor]:
    """Values of everything that can be asked for, from the first to the last."""
    values = {}
    for name, control in process.conditions.controls.items():
        ends = (control.low, control.high) if isinstance(control, Continuous) else None
        values[name] = torch.linspace(*ends, n) if ends else torch.arange(n) % int(control.size)
    return values
