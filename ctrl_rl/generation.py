"""Offline datasets drawn from the prior itself, labelled by a reward's classifiers.

The folder is an image folder as Hugging Face `datasets` reads it: pictures, and `metadata.csv` with
`file_name`, a column of labels for every control, and the prompt where the prior has any.
"""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.errors import ConfigError, RunError, check_sizes
from ctrl_rl.policies import PriorPolicy
from ctrl_rl.rollouts import rollout

METADATA, DESCRIPTION = "metadata.csv", "dataset.json"
_MOST_BATCHES = 10_000_000
FILE_NAME = "file_name"  # what `datasets` calls the column


@dataclass(frozen=True)
class GenerationPlan:
    """How much is drawn.

    Attributes:
        n: pictures.
        batch_size: drawn together; with the seed it decides what is drawn.
        seed: of the noise and the prompts.

    Raises:
        ConfigError: a size below 1 or a negative seed.
    """

    n: int
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes("generate", n=self.n, batch_size=self.batch_size)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more")


def generate_dataset(
    process: DenoisingProcess,
    plan: GenerationPlan,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    report: Callable[[int], None],
) -> dict[str, list[int]]:
    """Draw pictures of the prior, label and write them; go on where a former call stopped.

    Args:
        process: prior, kernel and the reward that labels.
        plan: how much is drawn.
        folder: gets the pictures, metadata.csv and dataset.json.
        settings: what else decides the pictures and labels, as json; kept, and compared when a
            folder is gone on with.
        report: told how many pictures there are, after every batch.

    Returns:
        How many pictures have each label, by control.

    Raises:
        ConfigError: samples that are no pictures, a reward without classifiers, or a folder that
            holds something else.
        RunError: the folder's metadata is damaged.
    """
    _check_labels(process)
    description = json.loads(json.dumps({**settings, **asdict(plan)}))
    rows = _started(folder, description, [*_columns(process)])
    with (folder / METADATA).open("a", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        while len(rows) < plan.n:
            batch = len(rows) // plan.batch_size
            found = _drawn(process, plan, batch)
            for sample, row in zip(*found, strict=True):
                name = f"{len(rows):06d}.png"
                _save_picture(folder / name, sample)
                rows.append([name, *row])
                table.writerow(rows[-1])
                if len(rows) == plan.n:
                    break
            file.flush()
            report(len(rows))
    counts = {}
    for place, (name, num_labels) in enumerate(process.controls.items(), start=1):
        labels = [int(row[place]) for row in rows]
        counts[name] = [labels.count(label) for label in range(num_labels)]
    return counts


def _columns(process: DenoisingProcess) -> list[str]:
    prompt = [keys.PROMPT] if process.prior.prompts else []
    return [FILE_NAME, *process.controls, *prompt]


@torch.no_grad()
def _drawn(
    process: DenoisingProcess, plan: GenerationPlan, batch: int
) -> tuple[list[Tensor], list[list[str]]]:
    """The samples of a batch, and their rows; a function of the seed and the batch's number."""
    device = process.kernel.scale.device
    seed = plan.seed * _MOST_BATCHES + batch  # no two seeds share a batch
    env = LatentEnv(process, num_envs=plan.batch_size, seed=seed, device=device)
    episode = rollout(env, PriorPolicy(process.kernel))
    samples = episode[keys.SAMPLE][:, -1]
    predicted = process.reward_model.predict(samples)
    assert predicted is not None  # checked before
    columns = [predicted[name].tolist() for name in process.controls]
    prompts = process.prior.prompts
    if prompts:
        places = episode[keys.CONTROL, keys.PROMPT][:, 0].tolist()
        columns.append([prompts.all[place] for place in places])
    return list(samples.cpu()), [
        [str(entry) for entry in row] for row in zip(*columns, strict=True)
    ]


def _check_labels(process: DenoisingProcess) -> None:
    shape = process.sample_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"samples of shape {shape} are no pictures; give a prior of images")
    sample = torch.zeros(1, *shape, device=process.kernel.scale.device)
    if process.reward_model.predict(sample) is None:
        raise ConfigError(
            "the reward has no classifiers that could label pictures; use one that has, such as "
            "reward=jpeg"
        )


def _started(folder: Path, description: dict[str, Any], columns: list[str]) -> list[list[str]]:
    """The rows that are there already, in whole batches; a new folder has none."""
    file = folder / DESCRIPTION
    if not file.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and no dataset of ours; give another out=")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(description, indent=2) + "\n")
        _write_rows(folder, columns, [])
        return []
    try:
        before = json.loads(file.read_text())
        with (folder / METADATA).open(newline="") as metadata:
            head, *rows = csv.reader(metadata)
    except (ValueError, OSError) as error:
        raise RunError(f"{folder} is damaged ({error}); remove it or give another out=") from error
    different = [key for key in description if before.get(key) != description[key]]
    if [key for key in different if key != "n"] or head != columns:
        wrong = next((key for key in different if key != "n"), METADATA)
        raise ConfigError(
            f"{folder} was drawn with another {wrong} ({before.get(wrong)}, now "
            f"{description.get(wrong)}); give another out="
        )
    whole = len(rows) // description["batch_size"] * description["batch_size"]
    if len(rows) < description["n"]:  # a batch that was interrupted is drawn anew
        rows = rows[:whole]
    file.write_text(json.dumps(description, indent=2) + "\n")
    _write_rows(folder, columns, rows)
    return rows


def _write_rows(folder: Path, columns: list[str], rows: list[list[str]]) -> None:
    with (folder / METADATA).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def _save_picture(file: Path, sample: Tensor) -> None:
    """A sample [1 or 3, H, W] in [-1, 1] as a PNG file."""
    from PIL import Image

    pixels = (sample.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(file)
