"""Going on with a run: the command, and whether a request is for the same one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctrl_rl.assets import anchor_paths
from ctrl_rl.errors import RunError
from ctrl_rl.learning.learner import AUTO
from ctrl_rl.runs.compose import stored
from ctrl_rl.runs.folder import Run
from ctrl_rl.runs.parts import GIVEN
from ctrl_rl.runs.trust import own_modules

_RATES = "trainer.learning_rate."
_MICROBATCH = "trainer.microbatch"


def resume_command(run: Run, config: DictConfig) -> str:
    """The command that resumes a run, with the user's own modules that it needs."""
    if config.get(GIVEN):
        return "the same call of ctrl_rl.train and resume=True"
    words = ["ctrl-rl", "train", f"resume={run.path}"]
    own = own_modules(config)
    if own:
        words.append(f"trust={own[0]}" if len(own) == 1 else f"trust=[{','.join(own)}]")
    return " ".join(words)


def difference(folder: Path, asked: DictConfig) -> str | None:
    """The first setting of a run that differs from the request, in words, or None.

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
    # A part that was given in Python is nothing in itself.
    for key in sorted(has.keys() | wants.keys(), key=lambda key: (not key.startswith(GIVEN), key)):
        if has.get(key) != wants.get(key):  # a setting newer than the run is null in it
            return f"{key}={has.get(key, '(missing)')} instead of {wants.get(key, '(missing)')}"
    return None


def _settings(config: DictConfig) -> dict[str, Any]:
    """All settings by dotted key after a round trip through yaml, without `run`."""
    plain = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(config)))
    assert isinstance(plain, dict)
    plain.pop("run", None)
    anchor_paths(plain)  # earlier versions stored relative ones
    return dict(_flat(plain))


def _flat(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
