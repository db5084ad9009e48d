"""The grid agent x task x seed: its cells and their configs.

Every config is composed here, before torch is imported: a typo in any of them costs seconds and no
run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_rl.errors import ConfigError, did_you_mean
from ctrl_rl.runs.arguments import check_value
from ctrl_rl.runs.compose import compose, files

if TYPE_CHECKING:
    from omegaconf import DictConfig

# The launchers that Hydra documents, and the package of each.
_PACKAGES = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
    "ray_aws": "hydra-ray-launcher",
}
_OF_THE_GRID = ("env", "agent", "method", "seed", "trainer.denoiser_calls")  # and all of run


@dataclass(frozen=True)
class Cell:
    """One agent on one task with one seed, or a method that needs no training.

    Attributes:
        task: name of the task.
        agent: name of the agent, or of the method.
        seed: of the run.
        config: the resolved `train` or `evaluate` config that makes the cell.
    """

    task: str
    agent: str
    seed: int
    config: "DictConfig"

    @property
    def name(self) -> str:
        """Name of the cell, and of its folder below the grid's root."""
        return f"{self.task}/{self.agent}-s{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.root) / self.config.run.name


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All cells, and how to run them.

    Attributes:
        cells: task by task, agent by agent, seed by seed; a method has only the first seed, as
            nothing in it depends on a seed.
        root: folder of the cells' runs.
        redo: whether to rerun cells that were made with other settings.
        out: folder of the report.
        launcher: name of the Hydra launcher.
        launcher_settings: its settings.
    """

    cells: list[Cell]
    root: Path
    redo: bool
    out: Path
    launcher: str
    launcher_settings: dict[str, Any]


def build_grid(config: "DictConfig", extra: Sequence[str] = ()) -> Grid:
    """The grid of a `benchmark` config.

    Args:
        config: the composed config.
        extra: the user's config folders.

    Raises:
        ConfigError: an unknown agent, task or launcher, a value of the wrong type, or a cell that
            cannot be composed.
    """
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(config)
    if values["agents"] is None:
        values["agents"] = list(files("agent", extra))
    methods = _names(values["methods"], "methods", "method", extra, empty=True)
    agents = _names(values["agents"], "agents", "agent", extra, empty=bool(methods))
    twice = sorted({*agents} & {*methods})
    if twice:
        raise ConfigError(f"'{twice[0]}' is an agent and a method; give another name to one")
    tasks = _names(values["tasks"], "tasks", "env", extra)
    seeds = values["seeds"]
    check_value(seeds, list[int], "seeds")
    _check_list(seeds, "seeds")
    for key in ("root", "out", "launcher"):
        check_value(values[key], str, key)
    check_value(values["redo"], bool, "redo")
    check_value(values["launcher_settings"], dict[str, Any], "launcher_settings")
    check_value(values["denoiser_calls"], int | None, "denoiser_calls")
    budget = "null" if values["denoiser_calls"] is None else values["denoiser_calls"]
    _check_launcher(values["launcher"])
    shared = _words(values["overrides"], "overrides")
    tuned = _tuned(values["settings"], agents, extra)
    composed: dict[tuple[str, str, int], Cell] = {}
    for seed in seeds:  # outermost, to try every agent and task early
        for task in tasks:
            for agent in agents:
                own = [f"env={task}", f"agent={agent}", f"seed={seed}"]
                own += [f"trainer.denoiser_calls={budget}", f"run.name={agent}-s{seed}"]
                words = [*shared, *tuned[agent], *own]
                asked = _compose("train", words, extra, f"{agent} on {task}")
                composed[task, agent, seed] = Cell(task, agent, seed, asked)
    for task in tasks:
        for method in methods:
            own = [f"env={task}", f"method={method}", f"seed={seeds[0]}"]
            words = [*shared, *own, f"run.name={method}-s{seeds[0]}"]
            asked = _compose("evaluate", words, extra, f"{method} on {task}")
            composed[task, method, seeds[0]] = Cell(task, method, seeds[0], asked)
    for cell in composed.values():
        cell.config.run.root = str(Path(values["root"]) / cell.task)
    places = [(t, name, s) for t in tasks for name in (*agents, *methods) for s in seeds]
    cells = [composed[place] for place in places if place in composed]
    return Grid(
        cells=cells,
        root=Path(values["root"]),
        redo=values["redo"],
        out=Path(values["out"]),
        launcher=values["launcher"],
        launcher_settings=values["launcher_settings"],
    )


def _compose(main: str, words: Sequence[str], extra: Sequence[str], where: str) -> "DictConfig":
    try:
        return compose(main, words, extra)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _names(
    given: Any, key: str, group: str, extra: Sequence[str], *, empty: bool = False
) -> list[str]:
    """Checked choices of a config group; `empty` allows none."""
    check_value(given, list[str], key)
    accepted = list(files(group, extra))
    if given or not empty:
        _check_list(given, key)
    for name in given:
        if name not in accepted:
            raise ConfigError(
                f"{key} names the unknown {group} '{name}'; {did_you_mean(name, accepted)}"
            )
    return list(given)


def _check_list(given: list[Any], key: str) -> None:
    if not given:
        raise ConfigError(f"{key}=[] leaves nothing to do; give at least one")
    twice = [entry for entry in given if given.count(entry) > 1]
    if twice:
        raise ConfigError(f"{key} has {twice[0]} twice; give each once")


def _words(given: Any, key: str) -> list[str]:
    """Checked overrides of cells; none may set what the grid decides."""
    check_value(given, list[str], key)
    for word in given:
        name = word.partition("=")[0].lstrip("+~")
        if name in _OF_THE_GRID or name.partition(".")[0] == "run":
            raise ConfigError(
                f"{key} has {word}, which the grid decides; "
                "use agents, methods, tasks, seeds, denoiser_calls and root"
            )
    return list(given)


def _tuned(given: Any, agents: Sequence[str], extra: Sequence[str]) -> dict[str, list[str]]:
    """Overrides of every agent."""
    check_value(given, dict[str, Any], "settings")
    known = list(files("agent", extra))
    for name in given:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"settings names the unknown agent '{name}'; {hint}")
    return {name: _words(given.get(name, []), f"settings.{name}") for name in agents}


def _check_launcher(name: str) -> None:
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # loads the installed launchers
    here = [file.removesuffix(".yaml") for file in ConfigStore.instance().list("hydra/launcher")]
    if name in here:
        return
    if name in _PACKAGES:
        raise ConfigError(
            f"launcher={name} needs a package that is not here: pip install {_PACKAGES[name]}"
        )
    raise ConfigError(f"unknown launcher '{name}'; {did_you_mean(name, {*here, *_PACKAGES})}")
