"""A run is a folder.

    config.yaml       resolved config
    metrics.jsonl     one line per update; no clock in it, so that equal seeds give equal files
    summary.json      the evaluation
    samples.png       what it looks like
    checkpoints/      000050/{policy,training}.safetensors and state.json; nothing is pickled

A checkpoint is written beside its place and renamed, so that a killed run never leaves half of one,
and it carries the hashes of its files, so that a damaged one is found before it is used.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ctrl_rl.errors import RunError, did_you_mean

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on as if never interrupted.

    Attributes:
        update: number of finished updates.
        policy: the policy's state dict.
        training: everything else that is a tensor: optimizer, average, agent, random states.
        counters: everything that is not.
    """

    update: int
    policy: dict[str, Tensor]
    training: dict[str, Tensor]
    counters: dict[str, Any]


class Run:
    """Reads and writes one run folder.

    Args:
        path: the folder; use `Run.create` or `Run.open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config_yaml: str, *, overwrite: bool) -> "Run":
        """Make a new folder with its config.

        Raises:
            RunError: the folder exists and may not be replaced.
        """
        if path.exists() and any(path.iterdir()):
            if not overwrite:
                raise RunError(
                    f"run folder {path} exists; go on with resume={path}, replace it with "
                    "run.overwrite=true, or give another run.name"
                )
            if not (path / "config.yaml").is_file():
                raise RunError(f"{path} is not a run folder, so it is not replaced; give another run.name")
            shutil.rmtree(path)
        run = cls(path)
        run._checkpoints.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config_yaml)
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing folder.

        Raises:
            RunError: there is no run at `path`; the nearest run beside it is named.
        """
        if not (path / "config.yaml").is_file():
            beside = path.parent.glob("*/config.yaml") if path.parent.is_dir() else iter(())
            known = [str(file.parent) for file in beside]
            raise RunError(f"no run folder at {path}; {did_you_mean(str(path), known)}")
        return cls(path)

    @property
    def config_yaml(self) -> str:
        """Text of the resolved config."""
        return (self.path / "config.yaml").read_text()

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, figures: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dict(figures)) + "\n")

    def metrics(self) -> Iterator[dict[str, float]]:
        """The lines of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            for line in file.read_text().splitlines():
                yield json.loads(line)

    def forget_metrics_after(self, update: int) -> None:
        """Drop lines of updates that a resumed run will do again, also a half-written last one."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            kept = file.read_text().splitlines(keepends=True)[:update]
            partial = file.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(file)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        partial = self.path / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        partial.replace(self.path / "summary.json")

    def save(self, checkpoint: Checkpoint, *, keep: int) -> Path:
        """Write a checkpoint and remove all but the newest `keep`."""
        from safetensors.torch import save_file

        folder = self._checkpoints / f"{checkpoint.update:06d}"
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        hashes = {}
        for name, tensors in {
            "policy.safetensors": checkpoint.policy,
            "training.safetensors": checkpoint.training,
        }.items():
            copies = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
            save_file(copies, partial / name)
            hashes[name] = _hash(partial / name)
        state = {"update": checkpoint.update, "counters": checkpoint.counters, "sha256": hashes}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(self._checkpoints / f"{old:06d}")
        return folder

    def checkpoints(self) -> list[int]:
        """Updates at which there is a checkpoint, oldest first, whether good or not."""
        folders = self._checkpoints.glob("*") if self._checkpoints.is_dir() else iter(())
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())

    def load(self, update: int | None = None) -> Checkpoint:
        """Read the newest checkpoint, or the one at `update`.

        Raises:
            RunError: there is none, or it is damaged; the newest good one before it is named.
        """
        known = self.checkpoints()
        if not known:
            raise RunError(f"{self.path} has no checkpoint; start it anew with run.overwrite=true")
        wanted = known[-1] if update is None else update
        if wanted not in known:
            raise RunError(f"{self.path} has no checkpoint {wanted}; {did_you_mean(str(wanted), map(str, known))}")
        reason = self._damage(wanted)
        if reason:
            good = [other for other in known if other < wanted and not self._damage(other)]
            offer = (
                f"the one at update {good[-1]} is good, add checkpoint={good[-1]}"
                if good
                else "there is no good one before it; start anew with run.overwrite=true"
            )
            raise RunError(f"checkpoint {self._checkpoints / f'{wanted:06d}'} is damaged ({reason}); {offer}")
        return self._read(wanted)

    def _read(self, update: int) -> Checkpoint:
        from safetensors.torch import load_file

        folder = self._checkpoints / f"{update:06d}"
        state = json.loads((folder / "state.json").read_text())
        return Checkpoint(
            update=state["update"],
            policy=load_file(folder / "policy.safetensors"),
            training=load_file(folder / "training.safetensors"),
            counters=state["counters"],
        )

    def _damage(self, update: int) -> str | None:
        """Why a checkpoint cannot be used, or None."""
        folder = self._checkpoints / f"{update:06d}"
        try:
            hashes = json.loads((folder / "state.json").read_text())["sha256"]
            for name, expected in hashes.items():
                if _hash(folder / name) != expected:
                    return f"{name} is not what was written"
        except (OSError, ValueError, KeyError) as error:
            return f"state.json: {type(error).__name__}" if not isinstance(error, OSError) else str(error)
        return None


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def no_logger(**arguments: Any) -> None:
    """Target of `logger=none`."""
    del arguments
