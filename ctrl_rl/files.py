"""Writing files whole or not at all, and reading those of strangers.

Everything is written beside its place, forced to the disk and renamed: a process that is killed, a
machine that loses power or a full disk leaves the old content or the new, never half of one.
"""

import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

PARTIAL = ".partial"  # ends the name of what is being written
_LARGEST_TEXT = 256 * 2**20  # bytes


def write_text(file: Path, text: str) -> None:
    """Write a text file whole; an existing one is replaced."""
    partial = file.with_name(file.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as content:
        content.write(text)
        content.flush()
        os.fsync(content.fileno())
    partial.replace(file)
    sync(file.parent)


def check_ordinary(file: Path, largest: int | None = None) -> None:
    """Refuse what opening would wait for, or what reading would never end.

    Raises:
        OSError: there is no such file, it is a folder, a named pipe or a device, or it has more
            than `largest` bytes.
    """
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe or a device"
        raise OSError(f"{file} is {kind}, and not a file")
    if largest is not None and about.st_size > largest:
        raise OSError(f"{file} has {about.st_size:,} bytes, more than any file of its kind")


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        OSError: as in `check_ordinary`.
        ValueError: it is no text.
    """
    check_ordinary(file, _LARGEST_TEXT)
    return file.read_text(encoding="utf-8")


def read_json(file: Path) -> Any:
    """What a json file holds.

    Raises:
        OSError: as in `check_ordinary`.
        ValueError: it is no json, or nested too deep.
    """
    try:
        return json.loads(read_text(file))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_object(file: Path) -> dict[str, Any]:
    """The json object that a file holds.

    Raises:
        OSError: as in `check_ordinary`.
        ValueError: it holds something else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError("it holds no values by name, as {...}")
    return content


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The numbers by name in every line of a json lines file.

    Raises:
        OSError: as in `check_ordinary`.
        ValueError: a line holds something else.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        try:
            row = json.loads(line)
            if not all(each is None or math.isfinite(each) for each in row.values()):
                raise ValueError("a number is not finite")
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"line {number} holds no numbers by name") from error
        rows.append(row)
    return rows


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        OSError: as in `check_ordinary`.
        ValueError: it holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_ordinary(file)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from error
    except MemoryError as error:
        raise OSError(f"{file} does not fit into memory") from error
    return tensors


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that is complex, or has NaN or infinity in it; or None."""
    return next((name for name, value in tensors.items() if not _is_finite(value)), None)


def _is_finite(value: Tensor) -> bool:
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # torch cannot tell for 8 bits
    return not value.is_complex() and bool(value.isfinite().all())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole, with the permissions of any other new file.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Tensors that share memory are refused otherwise.
    copies = {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()}
    partial = file.with_name(file.name + PARTIAL)
    try:
        save_file(copies, partial)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    open_to_others(partial)
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def copy_file(source: Path, file: Path) -> None:
    """Copy a file whole; an existing one is replaced."""
    partial = file.with_name(file.name + PARTIAL)
    shutil.copyfile(source, partial)
    sync(partial)
    partial.replace(file)
    sync(file.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a sibling to fill; it takes the folder's place only when the block succeeds."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (path for path in partial.rglob("*") if path.is_file()):
            sync(file)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_others(path: Path) -> None:
    """Give a file, or all in a folder, the permissions that the user's umask asks for.

    safetensors makes files that only their owner can read.
    """
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        file.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
