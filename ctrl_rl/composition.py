"""Composing configs: Hydra's compose with errors that a person can act on.

The yaml files are the registry: a group's choices are the files of its folder, here and in every
folder given as `--config-dir`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ctrl_rl.errors import ConfigError, did_you_mean


def config_folder() -> Path:
    """Folder of the project's own configs."""
    import ctrl_rl.configs

    return Path(ctrl_rl.configs.__path__[0])


def choices(group: str, extra: Sequence[str] = ()) -> list[str]:
    """Names of the yamls of a group, the project's and those of extra config folders."""
    folders = [config_folder(), *(Path(folder) for folder in extra)]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def groups() -> list[str]:
    """Names of all config groups."""
    folder = config_folder()
    return sorted(path.name for path in folder.iterdir() if any(path.glob("*.yaml")))


def compose(name: str, overrides: Sequence[str], extra: Sequence[str] = ()):  # type: ignore[no-untyped-def]
    """Compose a main config with overrides.

    Args:
        name: `train`, `pretrain` or `classifier`: a yaml at the top of the config folder.
        overrides: Hydra overrides, such as ``agent=ctrl`` or ``trainer.updates=100``.
        extra: more config folders, searched first; for plug-ins outside the project.

    Returns:
        The resolved `DictConfig`.

    Raises:
        ConfigError: an unknown group, choice, key or a missing value, with the nearest match.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for folder in extra:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder} is not a folder")
    _check_choices(overrides, extra)
    search = ",".join(f"file://{Path(folder).resolve()}" for folder in extra)
    paths = [f"hydra.searchpath=[{search}]"] if extra else []
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = hydra.compose(name, [*paths, *overrides], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), name, overrides)) from error
    OmegaConf.set_struct(composed, False)
    picked = composed.pop("hydra").runtime.choices
    composed.choices = {group: picked[group] for group in groups() if group in picked}
    try:
        OmegaConf.resolve(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_first_line(error)}") from error
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"no value for {missing[0]}; add {missing[0]}=…")
    OmegaConf.set_struct(composed, True)
    return composed


def _check_choices(overrides: Sequence[str], extra: Sequence[str]) -> None:
    """Refuse unknown choices by name before Hydra does so in a paragraph."""
    known = set(groups())
    for override in overrides:
        key, separator, value = override.partition("=")
        key = key.lstrip("+~")
        if not separator:
            raise ConfigError(f"'{override}' is no override; write key=value, such as agent=ctrl")
        if key in known and value not in ("null", *choices(key, extra)):
            raise ConfigError(f"unknown {key} '{value}'; {did_you_mean(value, choices(key, extra))}")


def _explain(message: str, name: str, overrides: Sequence[str]) -> str:
    """One line for a Hydra error, with the nearest key where a key is unknown."""
    unknown = re.search(r"Could not override '([^']+)'", message)
    if unknown:
        key = unknown.group(1)
        return f"unknown key '{key}'; {_nearest_key(key, name, overrides)}"
    return " ".join(message.split())


def _nearest_key(key: str, name: str, overrides: Sequence[str]) -> str:
    """Hint from the keys of the config that the other overrides give."""
    good = [other for other in overrides if other.partition("=")[0].lstrip("+~") != key]
    known = _keys(compose(name, good))
    parent = key.rpartition(".")[0]
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    return did_you_mean(key, siblings or [other for other in known if "." not in other])


def _keys(config, prefix: str = "") -> list[str]:  # type: ignore[no-untyped-def]
    """All dotted keys of a config."""
    found: list[str] = []
    for key in config:
        dotted = f"{prefix}{key}"
        found.append(dotted)
        if hasattr(config[key], "keys"):
            found.extend(_keys(config[key], f"{dotted}."))
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
