"""A run is a folder.

    config.yaml       resolved config
    metrics.jsonl     one line per update; no times in it: equal seeds give equal files
    summary.json      the evaluation
    samples.png       samples of the run
    denoising.gif     how samples form, if latents are images
    asked.png         what samples show over what was asked for, if a control is a number
    checkpoints/      000050/{policy,training}.safetensors and state.json; nothing is pickled

A checkpoint is written beside its place and renamed: a killed run never leaves half of one. It
carries the hashes of its files, which reveal damage before it is used.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_rl.errors import ConfigError, RunError, did_you_mean, one_line
from ctrl_rl.learning.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Where a run goes; `run` in `configs/train.yaml` explains each.

    Raises:
        ConfigError: the name is not that of one folder.
    """

    root: str
    name: str | int
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse a name that would leave the root."""
        name = str(self.name)
        if name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(
                f"run.name={name} is not the name of one folder; "
                "say where run folders live with run.root"
            )

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.root) / str(self.name)


class Run:
    """Reads and writes one run folder.

    Args:
        path: the folder; use `Run.create` or `Run.open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def check_free(cls, plan: RunPlan) -> None:
        """Check before any work that `create` may make the folder.

        Raises:
            RunError: the folder exists and may not be replaced.
        """
        run = cls(plan.path)
        path, is_empty = run.path, run.path.is_dir() and not any(run.path.iterdir())
        if not path.exists() or is_empty:
            return
        if not run.config_file.is_file():
            raise RunError(f"{path} exists and is no run folder; give another run.name")
        if not plan.overwrite:
            raise RunError(
                f"run folder {path} exists; resume it with resume={path}, replace it with "
                "run.overwrite=true, or give another run.name"
            )

    @classmethod
    def create(cls, plan: RunPlan, config_yaml: str) -> "Run":
        """Make a new folder with its config.

        Raises:
            RunError: the folder exists and may not be replaced.
        """
        cls.check_free(plan)
        run = cls(plan.path)
        if run.path.exists():
            shutil.rmtree(run.path)
        run._checkpoints.mkdir(parents=True)
        run.config_file.write_text(config_yaml)
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing folder.

        Raises:
            RunError: there is no run at `path`; the nearest run beside it, or in `runs`, is named.
        """
        run = cls(path)
        if not run.config_file.is_file():
            folders = {path.parent, path.parent / "runs"}
            known = {str(file.parent) for place in folders for file in place.glob("*/config.yaml")}
            hint = did_you_mean(str(path), known) if known else "train one with ctrl-rl train"
            raise RunError(f"no run folder at {path}; {hint}")
        return run

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, figures: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_strict(figures), allow_nan=False) + "\n")

    def metrics(self) -> Iterator[dict[str, float]]:
        """The lines of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            for line in file.read_text().splitlines():
                yield json.loads(line)

    def forget_after(self, update: int) -> None:
        """Drop lines and checkpoints of updates that a resumed run repeats, and partial ones."""
        for partial in self._checkpoints.glob("*.partial"):
            shutil.rmtree(partial)
        for later in self.checkpoints():
            if later > update:
                shutil.rmtree(self._checkpoints / f"{later:06d}")
        file = self.path / "metrics.jsonl"
        if file.is_file():
            kept = file.read_text().splitlines(keepends=True)[:update]  # only the last may be half
            partial = file.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(file)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        partial = self.path / "summary.json.partial"
        partial.write_text(json.dumps(_strict(summary), indent=2, allow_nan=False) + "\n")
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
        """Updates with a checkpoint, oldest first, good or not."""
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
            raise RunError(f"{self.path} has no checkpoint={wanted}; it has {known}")
        try:
            return self._read(wanted)
        except _DAMAGE as error:
            good = self._newest_good([other for other in known if other < wanted])
            offer = (
                "there is no good one before it; start anew with run.overwrite=true"
                if good is None
                else f"the one before it is good, add checkpoint={good}"
            )
            reason = one_line(error)
            raise RunError(
                f"checkpoint {self._checkpoints / f'{wanted:06d}'} is damaged ({reason}); {offer}"
            ) from error

    def _newest_good(self, updates: list[int]) -> int | None:
        for update in reversed(updates):
            try:
                self._read(update)
            except _DAMAGE:
                continue
            return update
        return None

    def _read(self, update: int) -> Checkpoint:
        """Read a checkpoint; raises one of `_DAMAGE` if a file is not what was written."""
        from safetensors.torch import load_file

        folder = self._checkpoints / f"{update:06d}"
        state = json.loads((folder / "state.json").read_text())
        tensors = {}
        for name, expected in state["sha256"].items():
            if _hash(folder / name) != expected:
                raise ValueError(f"{name} is not what was written")
            tensors[name] = load_file(folder / name)
        return Checkpoint(
            update=state["update"],
            policy=tensors["policy.safetensors"],
            training=tensors["training.safetensors"],
            counters=state["counters"],
        )


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _strict(value: Any) -> Any:
    """The same without NaN and infinity, which JSON lacks: they become null."""
    if isinstance(value, Mapping):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def no_logger(**arguments: Any) -> None:
    """Target of `logger=none`."""
    del arguments
