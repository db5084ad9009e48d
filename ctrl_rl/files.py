"""Writing files whole or not at all.

Everything is written beside its place, forced to the disk and renamed: a process that is killed, a
machine that loses power or a full disk leaves the old content or the new, never half of one.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

PARTIAL = ".partial"  # ends the name of what is being written


def write_text(file: Path, text: str) -> None:
    """Write a text file whole; an existing one is replaced."""
    partial = file.with_name(file.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as content:
        content.write(text)
        content.flush()
        os.fsync(content.fileno())
    partial.replace(file)
    sync(file.parent)


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
