"""Small folders of pictures for tests of datasets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

HALVES = {"train": 0.5, "evaluation": 0.5}
ROWS = [(f"{i}.png", str(i % 2)) for i in range(8)]


def image_folder(
    folder: Path, rows: Sequence[tuple[str, str]], sides: tuple[int, int] = (6, 4)
) -> Path:
    """Images of random pixels, all grey, with a label each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, _ in rows:
        pixels = generator.integers(0, 256, sides, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    write_table(folder, rows)
    return folder


def write_table(folder: Path, rows: Sequence[tuple[str, str]]) -> None:
    lines = ["file_name,mood", *(f"{name},{label}" for name, label in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def class_folders(folder: Path, classes: Sequence[str], each: int = 4) -> Path:
    """A sub-folder of images of random pixels for every class."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for place in range(each):
            pixels = generator.integers(0, 256, (6, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place}.png")
    return folder


def pixels_of(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.array(image)
