"""Your own examples as pictures in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ctrl_rl.data.folders import pictures_in
from ctrl_rl.data.labels import class_indices
from ctrl_rl.data.offline import OfflineDataset
from ctrl_rl.data.pictures import Picture, PictureReader
from ctrl_rl.data.splits import DEFAULT_FRACTIONS, stratified_dataset


def image_dataset(
    *,
    path: str | Path,
    label: str | None = None,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    size: Sequence[int] | None = None,
    channels: int | None = None,
    background: str = "white",
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> OfflineDataset:
    """A folder of images with `metadata.csv`, or with a sub-folder for every class.

    The first is what `ctrl-rl dataset` and others write, the image folder format of Hugging Face
    `datasets`. Images are turned upright as their EXIF data say, and equal ones go to the same
    split. Of an animation the first frame is read.

    Args:
        path: The folder. metadata.csv has a column `file_name`, relative to the folder, and one of
            labels: whole, 0 to K - 1, each used at least once, or names. Without it, the names of
            the sub-folders are the labels. Images are grey or RGB, 8 bits.
        label: The name of that column; None for sub-folders.
        num_labels: K, to check that no class is missing; None for as many as there are.
        label_names: Names of the K labels, in order; none if they are numbers, or for those in the
            data, sorted.
        size: Height and width to resize images to; None if all have one size.
        channels: 1 to make all images grey, 3 for RGB; None if they are alike.
        background: Colour behind transparent pixels, a name or "#rrggbb".
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the stratified splits.

    Returns:
        A dataset with x uint8 [N, 1 or 3, H, W] and K labels; grey if all images are.

    Raises:
        ConfigError: If the folder, a column or an image is missing or outside of the folder, a
            table, label or image cannot be read, sizes differ, equal images have different labels,
            or the fractions cannot be met.
    """
    reader = PictureReader(size=size, channels=channels, background=background)
    pictures = pictures_in(Path(path).expanduser(), label)
    return picture_dataset(pictures, reader, num_labels, label_names, fractions, seed)


def picture_dataset(
    pictures: Sequence[Picture],
    reader: PictureReader,
    num_labels: int | None,
    label_names: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
) -> OfflineDataset:
    """Reads labelled pictures; arguments and errors as of `image_dataset`."""
    labels, names = class_indices(pictures, num_labels, label_names)
    return stratified_dataset(
        reader.read(pictures), labels, fractions, seed, names, lambda row: pictures[row].where
    )
