"""One cell of a benchmark: the state of its folder, and running what is left of it.

A cell's folder is an ordinary run folder. A `failure.json` in it means that the last try failed:

    error      one line
    kind       name of the exception
    traceback  of an exception not raised on purpose, or null
"""

import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from ctrl_rl.errors import CtrlError, RunError, RunInUseError, one_line
from ctrl_rl.files import read_object, write_text
from ctrl_rl.learning.learner import AUTO
from ctrl_rl.runs.compose import stored
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.interrupts import Interrupted
from ctrl_rl.runs.marker import is_empty, is_marked, mark
from ctrl_rl.runs.train import evaluate_method, train_and_evaluate

_RATES = "trainer.learning_rate."
_MICROBATCH = "trainer.microbatch"
State = Literal["new", "interrupted", "failed", "finished"]


def state_of(folder: Path) -> State:
    """The state of a cell's folder.

    Raises:
        RunError: it holds something else, which nothing may remove.
    """
    if not is_empty(folder) and not (folder / "config.yaml").is_file() and not is_marked(folder):
        raise RunError(f"{folder} exists and is no run; give another root, or remove it yourself")
    if (folder / "failure.json").is_file():
        return "failed"
    if (folder / "summary.json").is_file():
        return "finished"
    return "interrupted" if Run(folder).checkpoints() else "new"


def failure_of(folder: Path) -> str:
    """The one-line error of a failed cell."""
    try:
        return str(read_object(folder / "failure.json")["error"])
    except (OSError, ValueError, KeyError):
        return "failure.json cannot be read"


def difference(folder: Path, asked: DictConfig) -> str | None:
    """The first setting of a cell's run that differs from the request, in words, or None.

    The run's location is not a setting.
    """
    try:
        has = _settings(stored(folder / "config.yaml"))
    except RunError as error:
        return str(error)
    wants = _settings(asked)
    # A run that lacks a rate has no parameters of that name, or it would have failed.
    has |= {key: rate for key, rate in wants.items() if key.startswith(_RATES) and key not in has}
    if wants.get(_MICROBATCH) == AUTO:
        has[_MICROBATCH] = AUTO  # the run stores the number found by trial
    for key in sorted(has.keys() | wants.keys()):
        if has.get(key) != wants.get(key):  # a setting newer than the run is null in it
            return f"{key}={has.get(key, '(missing)')} instead of {wants.get(key, '(missing)')}"
    return None


def run_cell(folder: Path, asked: DictConfig) -> str:
    """Run what is left of a cell; an error becomes `failure.json`.

    Args:
        folder: the cell's folder.
        asked: its config.

    Returns:
        The outcome in one line.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C; a checkpoint was written.
    """
    state = state_of(folder)
    try:
        if state == "interrupted":
            run = Run.open(folder)
            asked.trainer.microbatch = stored(run.config_file).trainer.get("microbatch")
            run = train_and_evaluate(asked, run, quiet=True)
        else:
            # Of a try that failed, or was killed before its first checkpoint.
            asked.run.overwrite = True
            untrained = asked.get("method") is not None
            run = (evaluate_method if untrained else train_and_evaluate)(asked, quiet=True)
    except Interrupted as error:
        raise KeyboardInterrupt from error
    except RunInUseError as error:  # its failure is not this process's to record
        return f"left alone: {error}"
    except Exception as error:  # also of a plug-in: the other cells still run
        _record(folder, error)
        return f"failed: {failure_of(folder)}"
    summary = run.summary
    return f"gap {summary['gap_nats']:.3f} nats, {summary['wall_s']:.0f} s"


def _record(folder: Path, error: Exception) -> None:
    if not is_marked(folder):
        mark(folder)
    on_purpose = isinstance(error, CtrlError)
    trace = None if on_purpose else "".join(traceback.format_exception(error))
    reason = one_line(error) if on_purpose else f"{type(error).__name__}: {one_line(error)}"
    failure = {"error": reason, "kind": type(error).__name__, "traceback": trace}
    write_text(folder / "failure.json", json.dumps(failure, indent=2) + "\n")


def _settings(config: DictConfig) -> dict[str, Any]:
    """All settings by dotted key after a round trip through yaml, without `run`."""
    plain = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(config)))
    assert isinstance(plain, dict)
    plain.pop("run", None)
    return dict(_flat(plain))


def _flat(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
