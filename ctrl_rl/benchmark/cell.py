"""One cell of a benchmark: the state of its folder, and running what is left of it.

A cell's folder is an ordinary run folder. A `failure.json` in it means that the last try failed:

    error      one line
    kind       name of the exception
    traceback  of an exception not raised on purpose, or null
"""

import json
import traceback
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from ctrl_rl.errors import CtrlError, RunError, RunInUseError, one_line
from ctrl_rl.files import read_object, write_text
from ctrl_rl.interrupts import Interrupted
from ctrl_rl.marker import is_empty, is_marked, mark
from ctrl_rl.runs.compose import stored
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.train import evaluate_method, train_and_evaluate

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
