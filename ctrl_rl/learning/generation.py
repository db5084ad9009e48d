"""Offline datasets drawn from the prior itself, labelled by a reward's classifiers.

The folder is an image folder as Hugging Face `datasets` reads it: pictures, and `metadata.csv` with
`file_name`, a column of labels for every control, and the prompt if the prior has prompts.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ctrl_rl import marker
from ctrl_rl.assets import anchor_paths
from ctrl_rl.conditions import label_counts
from ctrl_rl.controls import Categorical
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError, RunError, one_line
from ctrl_rl.files import PARTIAL, write_text
from ctrl_rl.interrupts import Interrupted
from ctrl_rl.learning.drawing import Drawing, GenerationPlan
from ctrl_rl.pixels import check_images

DESCRIPTION = "dataset.json"


def generate_dataset(
    process: DenoisingProcess,
    plan: GenerationPlan,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    report: Callable[[int], None],
) -> dict[str, list[int]]:
    """Draw pictures of the prior, label and write them; resume where an earlier call stopped.

    A row of metadata.csv is written after its picture is on the disk, and whatever is not whole,
    such as a picture that was removed since, is drawn again. Hold `marker.locked` where others may
    write into the folder.

    Args:
        process: prior, kernel and the reward that labels.
        plan: how much to draw.
        folder: gets the pictures, metadata.csv and dataset.json.
        settings: all else that decides the pictures and labels, as json; stored, and compared when
            a folder is resumed.
        report: called with the number of pictures, after every batch.

    Returns:
        How many pictures have each label, by control.

    Raises:
        ConfigError: samples that are not pictures, a reward without classifiers, or as in
            `check_folder`.
        RunError: the disk is full, or the folder is gone.
        Interrupted: Ctrl-C or SIGTERM; the same call resumes.
    """
    _check_labels(process)
    check_folder(folder, plan, settings)
    drawing = Drawing(process, plan, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawing.resume()
        described = _description(plan, settings) | {"n": max(plan.n, len(drawing.rows))}
        # Before anything else: it tells that the folder is ours.
        write_text(folder / DESCRIPTION, json.dumps(described, indent=2) + "\n")
        drawing.finish(report)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after picture {len(drawing.rows)} of {plan.n}; re-run the command to resume"
        ) from None
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {one_line(error)}; what was drawn before is whole: make "
            "room, then re-run the command to resume"
        ) from error
    counts = {}
    for place, (name, num_labels) in enumerate(label_counts(process.controls).items(), start=1):
        labels = [int(row[place]) for row in drawing.rows]
        counts[name] = [labels.count(label) for label in range(num_labels)]
    return counts


def check_folder(folder: Path, plan: GenerationPlan, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot be resumed, before anything is built.

    Raises:
        ConfigError: it holds something else, or was drawn with other settings.
        RunError: its description is damaged.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or _foreign(folder)):
            raise ConfigError(f"{folder} is no dataset of ours and not empty; give another out=")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it holds no settings")
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{file} is damaged ({one_line(error)}); remove {folder} to start anew, or give "
            "another out="
        ) from error
    anchor_paths(before)  # earlier versions stored relative ones
    for name, value in _description(plan, settings).items():
        if name != "n" and before.get(name) != value:
            was = before.get(name)
            values = f" ({was}, now {value})" if isinstance(value, int) else ""
            raise ConfigError(f"{folder} was drawn with another {name}{values}; give another out=")


def _foreign(folder: Path) -> set[str]:
    """What is in a folder but the lock and what a killed process wrote first."""
    return {each.name for each in folder.iterdir()} - {marker.FOLDER, DESCRIPTION + PARTIAL}


def _description(plan: GenerationPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(json.dumps({**asdict(plan), **settings}))
    return described


def _check_labels(process: DenoisingProcess) -> None:
    for name, control in process.controls.items():
        if not isinstance(control, Categorical):
            raise ConfigError(
                f"a dataset for classifiers needs labels, and the control {name} of this reward is "
                f"{control.described()}; use a reward of classifiers, such as reward=jpeg"
            )
    shape = process.sample_shape
    check_images(shape, "a dataset of pictures")
    sample = torch.zeros(1, *shape, device=process.kernel.scale.device)
    if process.reward_model.predict(sample) is None:
        raise ConfigError(
            "the reward has no classifiers that could label pictures; use one that has, such as "
            "reward=jpeg"
        )
