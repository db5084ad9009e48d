"""Your own examples as arrays in a file."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrl_rl.data.offline import OfflineDataset
from ctrl_rl.data.splits import DEFAULT_FRACTIONS, stratified_dataset
from ctrl_rl.errors import ConfigError, one_line

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def array_dataset(
    *,
    path: str | Path,
    label_names: Sequence[str] = (),
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> OfflineDataset:
    """Your own data: an .npz file with arrays `x` and `y`, as `numpy.savez` writes them.

    Equal rows of x go to the same split. Warns where no value is negative, as pixels in [0, 1]
    have it, which a prior in [-1, 1] never draws.

    Args:
        path: The file. `x` is floating point [N, *shape] in [-1, 1]; `y` is integer [N], and its
            values are 0 to K - 1, each used at least once.
        label_names: Names of the K labels, in order; none if they are numbers.
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the stratified splits.

    Returns:
        A dataset with K labels; x is converted to float32 and y to int64.

    Raises:
        ConfigError: If the file is missing, unreadable or does not hold such arrays, equal rows
            have different labels, or the fractions cannot be met.
    """
    x, y = _read_arrays(Path(path).expanduser())
    if x.dtype.kind != "f" or x.ndim < 2 or x.size == 0:
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
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        examples = torch.from_numpy(x.astype(np.float32))
    labels = torch.from_numpy(y.astype(np.int64))
    try:
        dataset = stratified_dataset(
            examples, labels, fractions, seed, label_names=label_names, where="row {} of x".format
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if 0 <= examples.min() < examples.max():
        warnings.warn(
            f"x in {path} lies in [{examples.min():g}, {examples.max():g}] and has no negative "
            "value: pixels in [0, 1] must be rescaled to [-1, 1] with 2 * x - 1",
            stacklevel=2,
        )
    return dataset


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ConfigError(f"no file at {path.absolute()}: give the path of an .npz file")
    try:
        _check_sizes(path)
        # A pickle runs code when read, so a file from elsewhere must not hold one.
        archive: Any = np.load(path, allow_pickle=False)
        names = getattr(archive, "files", ["one array without a name"])
        if {"x", "y"} <= set(names):
            with archive:
                arrays = archive["x"], archive["y"]
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds for a damaged file
        raise ConfigError(
            f"{path} is not a readable .npz file of plain arrays ({one_line(error, 200)}): "
            "write it with np.savez(path, x=x, y=y)"
        ) from error
    if not {"x", "y"} <= set(names):
        raise ConfigError(
            f"{path} holds {', '.join(names)}: write it with np.savez(path, x=x, y=y)"
        )
    return arrays


def _check_sizes(path: Path) -> None:
    """Refuse arrays whose headers promise more than the file holds, before memory is taken.

    Raises:
        ValueError: a header is damaged or promises more.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename in ("x.npy", "y.npy"):
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    if version not in _HEADERS:
                        raise ValueError(f"{member.filename} has a header of version {version}")
                    shape, _, dtype = _HEADERS[version](file)
                if not dtype.hasobject and math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(
                        f"{member.filename} promises {dtype} of shape {list(shape)} in "
                        f"{member.file_size} bytes"
                    )
