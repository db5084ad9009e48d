"""Folders of parquet or arrow files, read by Hugging Face `datasets`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from ctrl_rl.data.folders import open_file, path_inside
from ctrl_rl.data.images import picture_dataset
from ctrl_rl.data.offline import OfflineDataset
from ctrl_rl.data.pictures import Picture, PictureReader
from ctrl_rl.data.splits import DEFAULT_FRACTIONS
from ctrl_rl.errors import ConfigError, check_choice, did_you_mean, one_line

_SAVED = ("state.json", "dataset_dict.json")  # of a data set or several parts by save_to_disk


def hugging_face_dataset(
    *,
    path: str | Path,
    label: str,
    image: str | None = None,
    part: str | None = None,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    size: Sequence[int] | None = None,
    channels: int | None = None,
    background: str = "white",
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> OfflineDataset:
    """A folder of parquet files, or one that `save_to_disk` of `datasets` wrote.

    Nothing is downloaded. Images are read as by `image_dataset`.

    Args:
        path: The folder.
        label: The column of labels: classes of `datasets`, whole numbers or text.
        image: The column of images; None if there is only one.
        part: One of the folder's own parts, such as "train"; None for all of them.
        num_labels: As of `image_dataset`.
        label_names: Names of the labels, in order; none for those in the data.
        size: As of `image_dataset`.
        channels: As of `image_dataset`.
        background: As of `image_dataset`.
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the stratified splits.

    Returns:
        A dataset with x uint8 [N, 1 or 3, H, W].

    Raises:
        ConfigError: If `datasets` is not installed or cannot read the folder, there is no such
            column or part, or as of `image_dataset`.
    """
    reader = PictureReader(size=size, channels=channels, background=background)
    folder = Path(path).expanduser()
    pictures: list[Picture] = []
    named: set[tuple[str, ...]] = set()
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for part_name, table in _tables(folder, part, cache).items():
            column = _image_column(table, image, folder)
            _check_column("label", label, table.column_names, folder)
            named.add(tuple(getattr(table.features[label], "names", None) or ()))
            pictures += _pictures(table, column, label, folder, part_name)
    if len(named) != 1:
        raise ConfigError(
            f"the parts of {folder} name their labels differently: choose one in dataset.part"
        )
    names = label_names or named.pop()
    return picture_dataset(pictures, reader, num_labels, names, fractions, seed)


def _tables(folder: Path, part: str | None, cache: str) -> Mapping[str, Any]:
    """The tables of the folder's parts by name."""
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise ConfigError(
            f"dataset=hugging_face needs the package datasets ({error}): pip install datasets"
        ) from error
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: give a folder of parquet or arrow files")
    saved = any((folder / name).is_file() for name in _SAVED)
    if not saved and next(folder.rglob("*.parquet"), None) is None:
        raise ConfigError(
            f"{folder} holds no parquet file, and datasets.save_to_disk did not write it: give a "
            "folder of one of these kinds"
        )
    try:
        if saved:
            found = load_from_disk(str(folder))
        else:
            found = load_dataset("parquet", data_dir=str(folder), cache_dir=cache)
    except Exception as error:  # of arrow, the file system or the package itself
        raise ConfigError(
            f"datasets cannot read {folder} ({type(error).__name__}: {one_line(error, 200)}); "
            "write it anew, or install another version of datasets"
        ) from error
    parts = found if isinstance(found, DatasetDict) else DatasetDict({"all": found})
    if part is None:
        return parts
    check_choice("dataset.part", part, parts)
    return {part: parts[part]}


def _image_column(table: Any, given: str | None, folder: Path) -> str:
    from datasets import Image

    if given is not None:
        _check_column("image", given, table.column_names, folder)
        return given
    columns = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise ConfigError(
            f"{folder} has {len(columns)} columns of images: name one in dataset.image, of "
            f"{', '.join(table.column_names)}"
        )
    return columns[0]


def _check_column(setting: str, name: str, columns: Sequence[str], folder: Path) -> None:
    if name not in columns:
        raise ConfigError(
            f"dataset.{setting}: {folder} has no column {name!r}; {did_you_mean(name, columns)}"
        )


def _pictures(table: Any, image: str, label: str, folder: Path, part: str) -> Iterator[Picture]:
    from datasets import Image

    try:
        columns = table.select_columns([image, label]).with_format(None)
        rows = list(columns.cast_column(image, Image(decode=False)))
    except Exception as error:  # as above
        raise ConfigError(
            f"column {image} of {folder} does not hold images ({one_line(error, 200)}); name "
            "another in dataset.image"
        ) from error
    for number, row in enumerate(rows):
        where = f"row {number} of part {part} of {folder}"
        yield Picture(where, _opener(row[image], folder, where), _text(row[label], where))


def _opener(image: Mapping[str, Any] | None, folder: Path, where: str) -> Callable[[], IO[bytes]]:
    """What opens an image, which is in the row or in a file of the folder."""
    content, name = (image or {}).get("bytes"), (image or {}).get("path")
    if content is not None:
        return partial(io.BytesIO, content)
    if name is None:
        raise ConfigError(f"{where} has no image: remove the row")
    return partial(open_file, path_inside(folder, name, where))


def _text(label: Any, where: str) -> str:
    if label is None or label == -1:  # what `datasets` calls unlabelled
        return ""
    if not isinstance(label, int | str):
        raise ConfigError(
            f"{where} has the label {label!r}, but must have a whole number or text: name another "
            "column in dataset.label"
        )
    return str(label)
