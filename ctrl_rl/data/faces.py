"""Pixel faces with exact labels, shipped with the package: assets/faces/data."""

import csv
import json

import numpy as np
import torch

from ctrl_rl.assets import resolve
from ctrl_rl.data.offline import OfflineDataset
from ctrl_rl.errors import check_choice

_FOLDER = "package://faces/data"
_SIDE = 16  # pixels


def faces_dataset(*, control: str) -> OfflineDataset:
    """20,480 faces of 16x16 RGB pixels, drawn by DiceBear's "Pixel Art" (CC0 1.0).

    Every network has its own images: the splits are `prior`, `glasses`, `hat`,
    `glasses_heldout`, `hat_heldout`, `calibration` and `evaluation`, and all faces differ.

    Args:
        control: what the labels describe: "glasses", "hat", "hair", "background" or "clothes".

    Returns:
        A dataset with x uint8 [20480, 3, 16, 16] and named labels.

    Raises:
        ConfigError: no such control.
    """
    from PIL import Image

    folder = resolve(_FOLDER)
    about = json.loads((folder / "faces.json").read_text())
    check_choice("dataset.control", control, about["controls"])
    with (folder / "labels.csv").open(newline="") as text:
        labels = [int(row[control]) for row in csv.DictReader(text)]
    with Image.open(folder / "sheet.webp") as sheet:
        pixels = np.array(sheet.convert("RGB"))
    rows, columns = pixels.shape[0] // _SIDE, pixels.shape[1] // _SIDE
    tiles = pixels.reshape(rows, _SIDE, columns, _SIDE, 3).transpose(0, 2, 4, 1, 3)
    names = about["controls"][control]
    sizes = list(about["splits"].values())
    parts = torch.arange(len(labels)).split(sizes)
    return OfflineDataset(
        x=torch.from_numpy(np.ascontiguousarray(tiles.reshape(-1, 3, _SIDE, _SIDE))),
        labels=torch.tensor(labels),
        num_labels=len(names),
        splits=dict(zip(about["splits"], parts, strict=True)),
        label_names=tuple(names),
    )
