"""A run is a folder.

    .ctrl_rl/          the project's marker, and the lock of whoever writes
    config.yaml        resolved config
    metrics.jsonl      one line per update; no times in it: equal seeds give equal files
    summary.json       the evaluation
    samples.png        samples of the run
    denoising.gif      how samples form, if latents are images
    asked.png          what samples show over what was asked for, if a control is a number
    checkpoints/       000050/{policy,training}.safetensors and state.json; nothing is pickled
    evaluations/       000050/: an evaluation of an earlier checkpoint, apart from the newest's
    log/, wandb/       of the logger

Every file is written beside its place and renamed: a killed run never leaves half of one.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_rl import marker
from ctrl_rl.errors import ConfigError, RunError, did_you_mean, one_line
from ctrl_rl.files import read_json, read_rows, read_text, sync, write_text
from ctrl_rl.learning.checkpoint import Checkpoint
from ctrl_rl.runs.checkpoints import Checkpoints
from ctrl_rl.runs.compose import stored

# What an evaluation writes, and all that a run, its logger and `ctrl-rl sample` write, as patterns
# of paths below the folder: nothing else is ever deleted.
_OUR_FOLDERS = ("checkpoints", "evaluations", "log", "wandb")
RESULTS = ("summary.json", "samples.png", "denoising.gif", "asked.png")
_OURS = re.compile(
    r"(config\.yaml|metrics\.jsonl|failure\.json|summary\.json|samples\.png|denoising\.gif|asked\.png"
    r"|\.ctrl_rl/(run|holder)\.json"
    r"|sample-[^/]+-seed\d+\.(png|gif|npz)"
    r"|checkpoints/\d+(\.partial)?/(policy\.safetensors|training\.safetensors|state\.json)"
    r"|evaluations/\d+/(summary\.json|samples\.png|denoising\.gif|asked\.png)"
    r"|log/scalars/[^/]+\.csv|log/(log/)?events\.out\.tfevents\.[^/]+"
    r"|wandb/.+)(\.partial)?"
)


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
        """Check before any work that `start` may make the folder.

        Raises:
            RunError: the folder exists and may not be replaced.
        """
        path = plan.path
        if marker.is_empty(path):
            return
        if not marker.is_marked(path):
            raise RunError(
                f"{path} exists and does not carry the mark of a run; give another run.name, or "
                "remove it yourself"
            )
        if not plan.overwrite:
            raise RunError(
                f"run folder {path} exists; resume it with resume={path}, replace it with "
                "run.overwrite=true, or give another run.name"
            )

    @classmethod
    def create(cls, plan: RunPlan, config_yaml: str) -> "Run":
        """Make a new folder with its config; hold its lock where others may write.

        Raises:
            RunError: the folder exists and may not be replaced.
        """
        cls.check_free(plan)
        run = cls(plan.path)
        run.clear()
        marker.mark(run.path)
        write_text(run.config_file, config_yaml)
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
    def id(self) -> str | None:
        """Tells runs apart in a tracker; None for runs of before there were any."""
        return marker.run_id(self.path)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder, so that no other process writes into it.

        Raises:
            RunInUseError: another process does; it is named.
            RunError: the folder cannot be written.
        """
        return marker.locked(self.path)

    def clear(self) -> None:
        """Remove what a run wrote, in a marked folder; the user's own files stay."""
        if not marker.is_marked(self.path):
            return
        for file in _files(self.path):
            if _OURS.fullmatch(file.relative_to(self.path).as_posix()):
                file.unlink()
        for folder in sorted(_folders(self.path), reverse=True):  # the inner ones first
            ours = folder.relative_to(self.path).parts[0] in _OUR_FOLDERS
            if ours and not any(folder.iterdir()):
                folder.rmdir()

    def log(self, figures: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        with self._metrics_file.open("a") as file:
            file.write(json.dumps(_strict(figures), allow_nan=False) + "\n")

    def metrics(self) -> Iterator[dict[str, float]]:
        """The lines of metrics.jsonl, or `RunError` if it is damaged."""
        file = self._metrics_file
        if not os.path.lexists(file):
            return
        try:
            yield from read_rows(file)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{file} cannot be read ({one_line(error)}); put it back, or train the run anew"
            ) from error

    def forget_after(self, update: int) -> None:
        """Drop what a run that is resumed at `update` does again, and partial files."""
        self._checkpoints.forget_after(update)
        file = self._metrics_file
        lines = read_text(file).splitlines(keepends=True) if file.is_file() else []
        if len(lines) < update:
            raise RunError(
                f"{file} has {len(lines)} lines and the checkpoint is of update {update}; put the "
                "file back, or start anew with run.overwrite=true"
            )
        write_text(file, "".join(lines[:update]))  # only the last may be half
        evaluated = [int(each.name) for each in self._evaluations.glob("*") if each.name.isdigit()]
        stale = [self.evaluation(later) for later in evaluated if later > update]
        for folder in [self.path, *stale]:
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)

    def evaluation(self, update: int) -> Path:
        """The folder for the evaluation of a checkpoint: the run's own for the newest."""
        is_newest = max(self.checkpoints(), default=update) == update
        return self.path if is_newest else self._evaluations / f"{update:06d}"

    @property
    def _metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of summary.json, or an empty dict before the evaluation.

        Raises:
            RunError: the file is damaged.
        """
        return read_summary(self.path) if (self.path / "summary.json").is_file() else {}

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints")

    def save(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Write a checkpoint and remove all but the newest `keep`."""
        if self._metrics_file.is_file():
            sync(self._metrics_file)  # a checkpoint never outlives its lines
        self._checkpoints.save(checkpoint, keep=keep, made_by=self._made_by())

    def checkpoints(self) -> list[int]:
        """Updates with a checkpoint, oldest first, good or not."""
        return self._checkpoints.updates()

    def load(self, update: int | None = None) -> Checkpoint:
        """Read the newest checkpoint, or the one at `update`.

        Raises:
            RunError: as in `Checkpoints.load`.
        """
        return self._checkpoints.load(update, self._made_by())

    def _made_by(self) -> dict[str, Any]:
        """Task, agent and policy by the names of their yamls."""
        chosen = stored(self.config_file).get("choices") or {}
        return {name: chosen[name] for name in ("env", "agent", "policy") if name in chosen}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    text = json.dumps(_strict(summary), indent=2, allow_nan=False)
    write_text(folder / "summary.json", text + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json.

    Raises:
        RunError: it is missing or damaged.
    """
    file = folder / "summary.json"
    try:
        read = read_json(file)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read ({one_line(error)}); ctrl-rl evaluate run={folder} writes it "
            "again"
        ) from error
    if not isinstance(read, dict):
        raise RunError(f"{file} is no summary; ctrl-rl evaluate run={folder} writes it again")
    return read


def _files(path: Path) -> list[Path]:
    """All files below a folder; links are not followed."""
    return [Path(folder) / name for folder, _, names in os.walk(path) for name in names]


def _folders(path: Path) -> list[Path]:
    """All folders below a folder; links are not followed."""
    return [
        Path(folder) / name
        for folder, names, _ in os.walk(path)
        for name in names
        if not (Path(folder) / name).is_symlink()
    ]


def _strict(value: Any) -> Any:
    """The same without NaN and infinity, which JSON lacks: they become null."""
    if isinstance(value, Mapping):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
