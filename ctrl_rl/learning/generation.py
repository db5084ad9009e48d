"""Offline datasets drawn from the prior itself, labelled by a reward's classifiers.

The folder is an image folder as Hugging Face `datasets` reads it: pictures, and `metadata.csv` with
`file_name`, a column of labels for every control, and the prompt if the prior has prompts.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.assets import anchor_paths
from ctrl_rl.conditions import label_counts
from ctrl_rl.controls import Categorical
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError, RunError, check_sizes
from ctrl_rl.pixels import check_images, to_pixels
from ctrl_rl.policies import PriorPolicy

METADATA, DESCRIPTION = "metadata.csv", "dataset.json"
_MOST_BATCHES = 10_000_000
FILE_NAME = "file_name"  # what `datasets` calls the column


@dataclass(frozen=True)
class GenerationPlan:
    """How much to draw.

    Attributes:
        n: pictures.
        batch_size: drawn together; with the seed it decides what is drawn.
        seed: of the noise and the prompts.

    Raises:
        ConfigError: a size below 1 or a seed out of range.
    """

    n: int
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes("", n=self.n, batch_size=self.batch_size)
        if not 0 <= self.seed < 2**63 // _MOST_BATCHES:
            raise ConfigError(f"seed={self.seed} must be 0 to {2**63 // _MOST_BATCHES - 1}")


def generate_dataset(
    process: DenoisingProcess,
    plan: GenerationPlan,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    report: Callable[[int], None],
) -> dict[str, list[int]]:
    """Draw pictures of the prior, label and write them; resume where an earlier call stopped.

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
    """
    _check_labels(process)
    rows = _start(folder, plan, settings, _columns(process))
    device = process.kernel.scale.device
    env = LatentEnv(process, num_envs=plan.batch_size, device=device)
    with (folder / METADATA).open("a", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        while len(rows) < plan.n:
            # A function of the seed and the batch's number; no two seeds share a batch.
            env.set_seed(plan.seed * _MOST_BATCHES + len(rows) // plan.batch_size)
            for sample, row in zip(*_drawn(env), strict=True):
                name = f"{len(rows):06d}.png"
                _save_picture(folder / name, sample)
                rows.append([name, *row])
                table.writerow(rows[-1])
                if len(rows) == plan.n:
                    break
            file.flush()
            report(len(rows))
    counts = {}
    for place, (name, num_labels) in enumerate(label_counts(process.controls).items(), start=1):
        labels = [int(row[place]) for row in rows]
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
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is no dataset of ours and not empty; give another out=")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}); remove it or give another out=") from error
    anchor_paths(before)  # earlier versions stored relative ones
    for name, value in _description(plan, settings).items():
        if name != "n" and before.get(name) != value:
            was = before.get(name)
            values = f" ({was}, now {value})" if isinstance(value, int) else ""
            raise ConfigError(f"{folder} was drawn with another {name}{values}; give another out=")


def _description(plan: GenerationPlan, settings: Mapping[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(json.dumps({**asdict(plan), **settings}))
    return described


def _columns(process: DenoisingProcess) -> list[str]:
    prompt = [keys.PROMPT] if process.prior.prompts else []
    return [FILE_NAME, *process.controls, *prompt]


@torch.no_grad()
def _drawn(env: LatentEnv) -> tuple[list[Tensor], list[list[str]]]:
    """The samples of a batch, and their rows without the file's name."""
    process = env.process
    episode = rollout(env, PriorPolicy(process.kernel))
    samples = episode[keys.SAMPLE][:, -1]
    predicted = process.predict(samples)
    assert predicted is not None  # checked before
    columns = [predicted[name].tolist() for name in process.controls]
    prompts = process.prior.prompts
    if prompts:
        places = episode[keys.CONTROL, keys.PROMPT][:, 0].tolist()
        columns.append([prompts.all[place] for place in places])
    return list(samples), [[str(entry) for entry in row] for row in zip(*columns, strict=True)]


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


def _start(
    folder: Path, plan: GenerationPlan, settings: Mapping[str, Any], columns: list[str]
) -> list[list[str]]:
    """The existing rows, in whole batches; a new folder has none."""
    check_folder(folder, plan, settings)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    if (folder / METADATA).is_file():
        with (folder / METADATA).open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        if head != columns:
            raise ConfigError(f"{folder} has the columns {', '.join(head)}; give another out=")
    if len(rows) < plan.n:  # a batch that was interrupted is drawn anew
        rows = rows[: len(rows) // plan.batch_size * plan.batch_size]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    _replace(folder / METADATA, table.getvalue())
    described = _description(plan, settings) | {"n": max(plan.n, len(rows))}
    _replace(folder / DESCRIPTION, json.dumps(described, indent=2) + "\n")
    return rows


def _replace(file: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _save_picture(file: Path, sample: Tensor) -> None:
    """A sample [1 or 3, H, W] in [-1, 1] as a PNG file."""
    from PIL import Image

    Image.fromarray(to_pixels(sample).squeeze(-1).numpy(force=True)).save(file)
