"""The checkpoints of a run: folders 000050/{policy,training}.safetensors and state.json.

A checkpoint carries the hashes of its files, which reveal damage before it is used.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ctrl_rl.errors import RunError, one_line
from ctrl_rl.files import (
    PARTIAL,
    first_not_finite,
    read_object,
    read_tensors,
    whole_folder,
    write_tensors,
    write_text,
)
from ctrl_rl.learning.checkpoint import Checkpoint

_STATE = "state.json"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_COUNTED = ("prior", "policy", "reward", "wall_s")


class Checkpoints:
    """Reads and writes the checkpoints of one run.

    Args:
        folder: of all checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def updates(self) -> list[int]:
        """Updates with a checkpoint, oldest first, good or not."""
        folders = self.folder.glob("*") if self.folder.is_dir() else iter(())
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())

    def path(self, update: int) -> Path:
        """The folder of one."""
        return self.folder / f"{update:06d}"

    def save(self, checkpoint: Checkpoint, *, keep: int, made_by: dict[str, Any]) -> None:
        """Write a checkpoint and remove all but the newest `keep`.

        Args:
            checkpoint: what to write.
            keep: how many to leave.
            made_by: task, agent and policy, to tell it from another run's.

        Raises:
            OSError: the disk is full, or the folder is gone; the ones before are untouched.
        """
        hashes = {}
        with whole_folder(self.path(checkpoint.update)) as folder:
            for name, tensors in {
                "policy.safetensors": checkpoint.policy,
                "training.safetensors": checkpoint.training,
            }.items():
                write_tensors(folder / name, tensors)
                hashes[name] = _hash(folder / name)
            state = {
                "update": checkpoint.update,
                "made_by": made_by,
                "counters": checkpoint.counters,
                "sha256": hashes,
            }
            state["state_sha256"] = _own_hash(state)
            write_text(folder / _STATE, json.dumps(state, indent=2) + "\n")
        for old in self.updates()[:-keep]:
            shutil.rmtree(self.path(old))

    def forget_after(self, update: int) -> None:
        """Remove checkpoints of later updates, and partial ones."""
        for partial in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(partial)
        for later in self.updates():
            if later > update:
                shutil.rmtree(self.path(later))

    def load(self, update: int | None, made_by: dict[str, Any]) -> Checkpoint:
        """Read the newest checkpoint, or the one at `update`.

        Args:
            update: of the checkpoint; None for the newest.
            made_by: task, agent and policy of the run that asks.

        Raises:
            RunError: there is none, it may not be read, it is another run's, or it is damaged; the
                newest good one before it is named.
        """
        known, run = self.updates(), self.folder.parent
        if not known:
            raise RunError(f"{run} has no checkpoint; start it anew with run.overwrite=true")
        wanted = known[-1] if update is None else update
        if wanted not in known:
            raise RunError(f"{run} has no checkpoint={wanted}; it has {known}")
        try:
            return self._read(wanted, made_by)
        except PermissionError as error:
            raise RunError(
                f"{error.filename} may not be read; it is whole or not, nobody knows: ask its "
                "owner for the right to read it"
            ) from error
        except _DAMAGE as error:
            good = self._newest_good([other for other in known if other < wanted], made_by)
            offer = (
                "there is no good one before it; start anew with run.overwrite=true"
                if good is None
                else f"the one before it is good, add checkpoint={good}"
            )
            raise RunError(
                f"checkpoint {self.path(wanted)} is damaged ({one_line(error)}); {offer}"
            ) from error

    def _newest_good(self, updates: list[int], made_by: dict[str, Any]) -> int | None:
        for update in reversed(updates):
            try:
                self._read(update, made_by)
            except (*_DAMAGE, RunError):
                continue
            return update
        return None

    def _read(self, update: int, made_by: dict[str, Any]) -> Checkpoint:
        """Read a checkpoint; raises one of `_DAMAGE` if a file is not what was written."""
        folder = self.path(update)
        state = read_object(folder / _STATE)
        written = state.pop("state_sha256", None)
        if written is not None and written != _own_hash(state):
            raise ValueError(f"{_STATE} is not what was written")
        if state["update"] != update or any(
            isinstance(state["counters"][name], bool)
            or not isinstance(state["counters"][name], int | float)
            for name in _COUNTED
        ):
            raise ValueError(f"{_STATE} is not that of update {update}")
        for name, value in state.get("made_by", {}).items():
            if value != made_by.get(name, value):
                raise RunError(
                    f"checkpoint {folder} is of {name} {value}, and this run's is {made_by[name]}; "
                    "put its own checkpoint back"
                )
        tensors = {}
        for name in ("policy.safetensors", "training.safetensors"):
            tensors[name] = read_tensors(folder / name)  # before it is hashed: it may have no end
            if _hash(folder / name) != state["sha256"][name]:
                raise ValueError(f"{name} is not what was written")
            weights = {key: each for key, each in tensors[name].items() if _is_weight(name, key)}
            if first_not_finite(weights):
                raise ValueError(f"{name}: {first_not_finite(weights)} is not finite")
        return Checkpoint(
            update=update,
            policy=tensors["policy.safetensors"],
            training=tensors["training.safetensors"],
            counters=state["counters"],
        )


def _is_weight(file: str, name: str) -> bool:
    """Whether a tensor is drawn from; replays hold NaN where nothing was asked for."""
    return file == "policy.safetensors" or name.startswith("average.")


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _own_hash(state: dict[str, Any]) -> str:
    """Of everything in state.json but this hash."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
