"""Folders of pictures: a table of labels, or a sub-folder for every class."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from ctrl_rl.data.pictures import Picture
from ctrl_rl.errors import ConfigError, did_you_mean

_TABLE, _FILE_NAME = "metadata.csv", "file_name"  # as Hugging Face `datasets` calls them


def pictures_in(folder: Path, label: str | None) -> list[Picture]:
    """The labelled pictures of a folder, none of them read yet.

    Args:
        folder: With metadata.csv, or with a sub-folder of pictures for every class.
        label: Column of metadata.csv; None without one.

    Raises:
        ConfigError: If the folder, its table, a column or a file is missing or not as it must be,
            or a name leads out of the folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"no folder {folder}: give a folder of images with metadata.csv, or with a sub-folder "
            "for every class"
        )
    table = folder / _TABLE
    if table.is_file():
        return _of_table(folder, table, label)
    if label is not None:
        raise ConfigError(
            f"no {table} to have a column {label}: give a folder of images with metadata.csv, or "
            "leave out dataset.label, and its sub-folders are the classes"
        )
    return _of_classes(folder)


def path_inside(folder: Path, name: str, where: str) -> Path:
    """The file of a name, which must lie in the folder even if it is a link.

    Raises:
        ConfigError: If it lies elsewhere or does not exist.
    """
    try:
        file = (folder / name).resolve()
        inside = not Path(name).is_absolute() and file.is_relative_to(folder.resolve())
        exists = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a null character
        raise ConfigError(f"{where} names {name!r}, which is no file: {error}") from error
    if not inside:
        raise ConfigError(
            f"{where} names {name!r}, which is outside of {folder}: copy the picture into the "
            "folder, and name it relative to that"
        )
    if not exists:
        raise ConfigError(
            f"{where} names {name!r}, and {folder} has no such file: correct the name, or remove it"
        )
    return file


def open_file(file: Path) -> IO[bytes]:
    """A file open for reading."""
    return file.open("rb")


def _of_table(folder: Path, table: Path, label: str | None) -> list[Picture]:
    pictures = []
    for line, name, given in _rows(table, label):
        file = path_inside(folder, name, f"line {line} of {table}")
        where = f"{folder / name} (line {line} of {_TABLE})"
        pictures.append(Picture(where, partial(open_file, file), given))
    if not pictures:
        raise ConfigError(f"{table} has no rows: give it one for every picture")
    return pictures


def _rows(table: Path, label: str | None) -> Iterator[tuple[int, str, str]]:
    """For every row the line it ends in, the name of its file and its label."""
    reader = csv.DictReader(io.StringIO(_text(table), newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        column = _label_column(table, columns, label)
        for row in reader:
            extra = row.pop(None, None)
            if None in row.values() or (extra and any(extra)):
                number = sum(value is not None for value in row.values()) + len(extra or ())
                raise ConfigError(
                    f"line {reader.line_num} of {table} has {number} entries, and the first line "
                    f"names {len(columns)} columns: complete it, and put quotes around text with "
                    "commas"
                )
            yield reader.line_num, row[_FILE_NAME], row[column]
    except csv.Error as error:
        raise ConfigError(
            f"line {reader.line_num + 1} of {table} cannot be read ({error}): close every quote, "
            "and double those within text"
        ) from error


def _text(table: Path) -> str:
    content = table.read_bytes()
    try:
        return content.decode("utf-8-sig")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"line {line} of {table} is not UTF-8: save the table as UTF-8, for instance with "
            "iconv -f latin1 -t utf-8"
        ) from error


def _label_column(table: Path, columns: list[str], label: str | None) -> str:
    """The column of labels, if the table has it and one of file names."""
    if len(columns) == 1:
        for separator, name in {";": "semicolons", "\t": "tabs", "|": "bars"}.items():
            if separator in columns[0]:
                raise ConfigError(
                    f"line 1 of {table} separates columns by {name}: save the table with commas"
                )
    if label is None:
        others = [column for column in columns if column != _FILE_NAME]
        raise ConfigError(f"give dataset.label, a column of {table}; {did_you_mean('', others)}")
    for name in (_FILE_NAME, label):
        if columns.count(name) != 1:
            fault = "more than one column" if name in columns else "no column"
            raise ConfigError(f"{table} has {fault} {name!r}; {did_you_mean(name, columns)}")
    return label


def _of_classes(folder: Path) -> list[Picture]:
    pictures = []
    for kind in _visible(folder):
        if not kind.is_dir():
            if _looks_like_picture(kind):
                raise ConfigError(
                    f"{kind} has no label: write metadata.csv with columns file_name and a label, "
                    "or put it into the sub-folder of its class"
                )
            continue
        files = _visible(kind)
        if not files:
            raise ConfigError(f"{kind} is the folder of a class without any picture: remove it")
        for file in files:
            if file.is_dir():
                raise ConfigError(
                    f"{file} is a folder within a class: give dataset.path={kind} if its own "
                    "sub-folders are the classes, or move the pictures up"
                )
            found = path_inside(folder, str(file.relative_to(folder)), f"the class {kind.name}")
            pictures.append(Picture(str(file), partial(open_file, found), kind.name))
    if not pictures:
        raise ConfigError(
            f"{folder} has neither metadata.csv nor sub-folders: give a folder of images with "
            "metadata.csv, or with a sub-folder for every class"
        )
    return pictures


def _visible(folder: Path) -> list[Path]:
    """Sorted entries but those that file managers and archives leave behind."""
    left_behind = ("Thumbs.db", "desktop.ini", "__MACOSX")
    entries = (each for each in folder.iterdir() if not each.name.startswith("."))
    return sorted(each for each in entries if each.name not in left_behind)


def _looks_like_picture(file: Path) -> bool:
    from PIL import Image

    return file.suffix.lower() in Image.registered_extensions()
