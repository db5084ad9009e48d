"""Running the cells of a grid through a Hydra launcher: here, in processes, on a cluster.

The grid acts as a Hydra sweeper: it hands the launcher one job per remaining cell. A job is the
override `+cell=NAME` and finds its config in ROOT/.cells/NAME.yaml. A job on another machine needs
only the file system.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from hydra import compose, initialize
from hydra._internal.callbacks import Callbacks  # a HydraContext needs them
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ctrl_rl.benchmark.cell import State, run_cell, state_of
from ctrl_rl.benchmark.grid import Cell, Grid
from ctrl_rl.errors import ConfigError, CtrlError, RunError, did_you_mean, one_line
from ctrl_rl.interrupts import Interrupted, interrupt_on_terminate, stop_with_parent
from ctrl_rl.runs.compose import stored
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.progress import say
from ctrl_rl.runs.resuming import difference


class LauncherError(CtrlError):
    """The launcher itself failed; finished cells are kept."""


def run_grid(grid: Grid) -> None:
    """Run every unfinished cell: resume it if it was interrupted, else start it.

    Raises:
        ConfigError: the launcher does not take a setting.
        RunError: a cell was made with other settings.
        Interrupted: the user pressed Ctrl-C.
        LauncherError: the launcher itself failed.
    """
    states = {cell.name: state_of(cell.folder) for cell in grid.cells}
    changed = _changed([cell for cell in grid.cells if states[cell.name] in _HOLDS_WORK])
    with _launcher(grid, sum(state != "finished" for state in states.values())) as launcher:
        if changed and not grid.redo:
            name, what = next(iter(changed.items()))
            more = f" (and {len(changed) - 1} other cells)" if len(changed) > 1 else ""
            raise RunError(
                f"cell {name} was made with {what}{more}; give another root, or redo=true to make "
                "such cells anew"
            )
        for cell in grid.cells:
            if cell.name in changed:
                Run(cell.folder).clear()
                states[cell.name] = "new"
        counts = Counter(states.values())
        told = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
        say(f"{grid.root}: {len(grid.cells)} cells, {told}")
        left = [cell for cell in grid.cells if states[cell.name] != "finished"]
        if left:
            _write_asked(grid, left)
            _launch(launcher, left)


_HOLDS_WORK: tuple[State, ...] = ("finished", "interrupted")
_ORDER: tuple[State, ...] = (*_HOLDS_WORK, "failed", "new")


def _changed(cells: list[Cell]) -> dict[str, str]:
    """Differences from the requested settings, by cell name."""
    differences = {cell.name: difference(cell.folder, cell.config) for cell in cells}
    return {name: what for name, what in differences.items() if what is not None}


def _write_asked(grid: Grid, cells: list[Cell]) -> None:
    for cell in cells:
        file = _asked_file(str(grid.root), cell.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(OmegaConf.to_yaml(cell.config))


def _asked_file(root: str, name: str) -> Path:
    return Path(root) / ".cells" / f"{name}.yaml"


@contextmanager
def _launcher(grid: Grid, total: int) -> Iterator[Launcher]:
    """The Hydra launcher, ready for jobs."""
    folder = str(grid.root / ".cells").replace("'", "\\'")
    words = [
        f"hydra/launcher={grid.launcher}",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir='{folder}'",
        "hydra.sweep.subdir=.",
    ]
    with initialize(config_path=None, job_name="cell", version_base="1.3"):
        config = compose(overrides=words, return_hydra_config=True)
        accepted = [str(key) for key in config.hydra.launcher if key != "_target_"]
        for key, value in grid.launcher_settings.items():
            name = f"launcher_settings.{key}"
            if key not in accepted:
                hint = did_you_mean(str(key), accepted)
                raise ConfigError(f"launcher={grid.launcher} takes no {name}; {hint}")
            try:
                OmegaConf.update(config, f"hydra.launcher.{key}", value)
            except OmegaConfBaseException as error:
                raise ConfigError(f"{name}={value}: {one_line(error)}") from error
        yield Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(
                config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks()
            ),
            task_function=partial(_job, str(grid.root), total, os.getpid()),
            config=config,
        )


def _launch(launcher: Launcher, cells: list[Cell]) -> None:
    try:
        launcher.launch([[f"+cell={cell.name}"] for cell in cells], initial_job_idx=0)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; re-run the command to resume") from None
    except Exception as error:  # a lost node, a killed worker: launchers raise anything
        raise LauncherError(
            f"the launcher failed: {type(error).__name__}: {one_line(error)}; finished cells are "
            "kept; re-run the command to resume"
        ) from error


def _job(root: str, total: int, main: int, job: DictConfig) -> None:
    """Run the cell named `job.cell`; launchers call this, here or on another machine.

    Args:
        root: of the grid.
        total: number of cells.
        main: process that runs the grid.
        job: names the cell.
    """
    if "" not in sys.path:
        sys.path.append("")  # plug-ins in the working directory, as in the command line
    config = stored(_asked_file(root, job.cell))
    is_worker = os.getpid() != main
    if is_worker:
        interrupt_on_terminate()
    with stop_with_parent() if is_worker else nullcontext():
        outcome = run_cell(Path(config.run.root) / config.run.name, config)
    say(f"{HydraConfig.get().job.num + 1} of {total}  {job.cell}: {outcome}")
