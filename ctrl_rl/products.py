"""Folders that commands write whole: each command knows its own, and replaces nothing else."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ctrl_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Product:
    """What a command writes into a folder of its own.

    Attributes:
        name: what it is called, such as "classifier".
        files: pattern of the paths of its files, below the folder.
        told_by: the json file by which an earlier one is recognised.
        fields: some of what that file holds.
    """

    name: str
    files: re.Pattern[str]
    told_by: str
    fields: frozenset[str]

    def check_replaceable(self, out: Path) -> None:
        """Refuse a path that holds anything but an earlier product.

        Raises:
            ConfigError: it does, it is a file, or it may not be written.
        """
        obstacle = self._obstacle(out)
        if obstacle:
            raise ConfigError(
                f"will not write a {self.name} to {out}, since {obstacle}: choose a new or empty "
                f"folder, or that of an earlier {self.name}"
            )

    def _obstacle(self, out: Path) -> str:
        """Why a path may not be replaced; empty if it may."""
        if not out.name:
            return "it is the root of all folders"
        if not os.path.lexists(out):
            return ""
        if not out.is_dir():
            return "it is a file"
        if not os.access(out, os.W_OK | os.X_OK):
            return "you may not write there"
        if not any(out.iterdir()):
            return ""
        foreign = self._foreign(out)
        if foreign:
            return f"it holds {foreign!r}"
        return "" if self._is_told(out / self.told_by) else f"it has no {self.told_by} of one"

    def _foreign(self, out: Path) -> str:
        """The first entry that no product has, empty folders and links to folders included."""
        for place, folders, files in os.walk(out):
            here = Path(place)
            links = [name for name in folders if (here / name).is_symlink()]
            names = [(here / name).relative_to(out).as_posix() for name in sorted(files + links)]
            foreign = [name for name in names if not self.files.fullmatch(name)]
            if not folders and not files:
                foreign = [here.relative_to(out).as_posix()]
            if foreign:
                return foreign[0]
        return ""

    def _is_told(self, file: Path) -> bool:
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(read, dict) and self.fields <= read.keys()
