"""control.json of an exported folder: what it must hold to be loaded.

Exported folders come from strangers: only the names of this page choose classes, by name.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from ctrl_rl.controls import Control, as_control
from ctrl_rl.errors import ConfigError, check_choice, one_line
from ctrl_rl.export.schedulers import SCHEDULERS

SETTINGS = "control.json"
PARTS = {  # by the pipeline, what it calls the network
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
    "FluxPipeline": "transformer",
}
DTYPES = ("float32", "bfloat16", "float16")
_KINDS: dict[str, Any] = {
    "base_model": str,
    "pipeline": str,
    "dtype": str,
    "part": str,
    "scheduler": str,
    "scheduler_settings": dict,
    "controls": dict,
    "read_out": bool,
    "call": dict,
}
_OF_SCHEDULER = ("noise_level",)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read control.json.

    Args:
        folder: the exported folder.

    Raises:
        ConfigError: it is missing, damaged, or asks for anything that is never exported.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise ConfigError(f"{folder} has no {SETTINGS}; give what `ctrl-rl export` made")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        _check(settings)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"{file} is not what `ctrl-rl export` writes: {one_line(error)}; export again, or "
            "fetch it again"
        ) from error
    return dict(settings)


def controls_of(settings: Mapping[str, Any]) -> dict[str, Control]:
    """The controls; earlier releases stored numbers of labels, and names separately."""
    names = settings.get("label_names", {})
    return {k: as_control(names.get(k) or one, k) for k, one in settings["controls"].items()}


def _check(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ConfigError("it holds no settings")
    for name, kind in _KINDS.items():
        if type(settings.get(name)) is not kind:
            shown = json.dumps(settings.get(name))[:40]
            raise ConfigError(f"{name}={shown} must be a {kind.__name__}")
    check_choice("pipeline", settings["pipeline"], PARTS)
    check_choice("part", settings["part"], [PARTS[settings["pipeline"]]])
    check_choice("dtype", settings["dtype"], DTYPES)
    check_choice("scheduler", settings["scheduler"], SCHEDULERS)
    for name, value in settings["scheduler_settings"].items():
        check_choice("setting of the scheduler", name, _OF_SCHEDULER)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name}={json.dumps(value)[:40]} must be a number")
    taken = inspect.signature(getattr(diffusers, settings["pipeline"]).__call__).parameters
    for name in settings["call"]:
        check_choice("argument of the call", name, [each for each in taken if each != "self"])
    if not isinstance(settings.get("label_names", {}), dict):
        raise ConfigError("label_names must be a dict")
    controls_of(settings)
