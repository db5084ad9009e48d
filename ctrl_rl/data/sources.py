"""Where offline datasets come from: scikit-learn's digits, arrays, folders of images."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ctrl_rl.data.offline import DEFAULT_FRACTIONS, OfflineDataset, stratified_dataset
from ctrl_rl.errors import ConfigError, did_you_mean

_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # Pillow's: as stored, as read


def digits_dataset(
    *, fractions: Mapping[str, float] = DEFAULT_FRACTIONS, seed: int = 0
) -> OfflineDataset:
    """The 1797 handwritten digits of scikit-learn, as 8x8 images (no download).

    Args:
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the stratified splits.

    Returns:
        A dataset with x float32 [1797, 1, 8, 8] and 10 labels, called "0" to "9".

    Raises:
        ConfigError: If the fractions cannot be met.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The pixels are ink counts from 0 to 16 (UCI "Optical Recognition of Handwritten Digits").
    x = torch.from_numpy(digits.images[:, None] / 8 - 1).float()
    labels = torch.from_numpy(digits.target).long()
    names = [str(name) for name in digits.target_names]
    return stratified_dataset(x, labels, fractions, seed, label_names=names)


def array_dataset(
    *,
    path: str | Path,
    label_names: Sequence[str] = (),
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> OfflineDataset:
    """Your own data: an .npz file with arrays `x` and `y`, as `numpy.savez` writes them.

    Args:
        path: The file. `x` is floating point [N, *shape] in [-1, 1]; `y` is integer [N], and its
            values are 0 to K - 1, each used at least once.
        label_names: Names of the K labels, in order; none if they are numbers.
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the stratified splits.

    Returns:
        A dataset with K labels; x is converted to float32 and y to int64.

    Raises:
        ConfigError: If the file is missing, unreadable or does not hold such arrays, or if the
            fractions cannot be met.
    """
    x, y = _read_arrays(Path(path).expanduser())
    if x.dtype.kind != "f" or x.ndim < 2 or len(x) == 0:
        raise ConfigError(
            f"x in {path} is {x.dtype} of shape {list(x.shape)}, but must be non-empty floating "
            "point [N, *shape]: convert it, for instance x.astype('float32') / 127.5 - 1"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ConfigError(
            f"y in {path} is {y.dtype} of shape {list(y.shape)}, but must be integer "
            f"[{len(x)}], one label per row of x: convert it with y.astype('int64').reshape(-1)"
        )
    used = np.unique(y)
    if not np.array_equal(used, np.arange(len(used))):
        raise ConfigError(
            f"y in {path} uses {len(used)} labels between {used[0]} and {used[-1]}, but must use "
            "every one of 0 to K - 1: renumber with np.unique(y, return_inverse=True)[1]"
        )
    examples = torch.from_numpy(x.astype(np.float32))
    labels = torch.from_numpy(y.astype(np.int64))
    return stratified_dataset(examples, labels, fractions, seed, label_names=label_names)


def image_dataset(
    *,
    path: str | Path,
    label: str,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    size: Sequence[int] | None = None,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> OfflineDataset:
    """A folder of images with `metadata.csv`, as `ctrl-rl dataset` and others write it.

    This is the image folder format of Hugging Face `datasets`.

    Args:
        path: The folder. metadata.csv has a column `file_name`, relative to the folder, and one of
            whole labels, 0 to K - 1, each used at least once. Images are grey or RGB, 8 bits.
        label: The name of that column.
        num_labels: K, to check that no class is missing; None for one more than the largest label.
        label_names: Names of the K labels, in order; none if they are numbers.
        size: Height and width to resize images to; None if all have one size.
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the stratified splits.

    Returns:
        A dataset with x uint8 [N, 1 or 3, H, W] and K labels; grey if all images are.

    Raises:
        ConfigError: If the folder, a column or an image is missing, sizes differ, or the fractions
            cannot be met.
    """
    from PIL import Image

    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ConfigError(f"dataset.size={list(size)} must be [height, width], in pixels")
    folder = Path(path).expanduser()
    rows = _read_metadata(folder / "metadata.csv", label)
    labels = np.asarray([_whole(row[label], label, folder) for row in rows])
    classes = int(labels.max()) + 1 if num_labels is None else num_labels
    absent = sorted(set(range(classes)) - set(labels.tolist()))
    if absent or labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(
            f"column {label} of {folder / 'metadata.csv'} must hold every one of 0 to "
            f"{classes - 1}" + (f", and no picture has {absent[0]}: add some" if absent else "")
        )
    images = []
    for row in rows:
        try:
            with Image.open(folder / row["file_name"]) as opened:
                if opened.mode not in _MODES:
                    raise ConfigError(
                        f"{folder / row['file_name']} has mode {opened.mode}, but must be grey or "
                        "RGB with 8 bits a channel: convert it first"
                    )
                image = opened.convert(_MODES[opened.mode])
                if size is not None:
                    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
                images.append(np.asarray(image, dtype=np.uint8))
        except OSError as error:
            raise ConfigError(f"{folder / row['file_name']} cannot be read: {error}") from error
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ConfigError(
            f"the images of {folder} have shapes {', '.join(map(str, shapes[:4]))}: give "
            "dataset.size=[height,width] to make them one, and convert all to grey or to colour"
        )
    stacked = torch.from_numpy(np.stack(images))
    x = (stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)).contiguous()
    labelled = torch.from_numpy(labels)
    return stratified_dataset(x, labelled, fractions, seed, label_names=label_names)


def _read_metadata(file: Path, label: str) -> list[dict[str, str]]:
    if not file.is_file():
        raise ConfigError(f"no {file}: give a folder of images with metadata.csv")
    with file.open(newline="", encoding="utf-8-sig") as text:  # Excel writes a byte order mark
        table = csv.DictReader(text)
        columns, rows = list(table.fieldnames or ()), list(table)
    for name in ("file_name", label):
        if name not in columns:
            raise ConfigError(f"{file} has no column {name!r}; {did_you_mean(name, columns)}")
    if not rows:
        raise ConfigError(f"{file} has no rows")
    return rows


def _whole(text: str, label: str, folder: Path) -> int:
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ConfigError(
            f"column {label} of {folder / 'metadata.csv'} holds {text!r}, which is no whole label"
        ) from None


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ConfigError(f"no file at {path.absolute()}: give the path of an .npz file")
    try:
        # A pickle runs code when read, so a file from elsewhere must not hold one.
        archive = np.load(path, allow_pickle=False)
        names = getattr(archive, "files", ["one array without a name"])
        if not {"x", "y"} <= set(names):
            raise ConfigError(
                f"{path} holds {', '.join(names)}: write it with np.savez(path, x=x, y=y)"
            )
        with archive:
            return archive["x"], archive["y"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is not a readable .npz file of plain arrays ({error}): "
            "write it with np.savez(path, x=x, y=y)"
        ) from error
