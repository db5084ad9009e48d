"""Composing configs: Hydra's compose with errors that a user can act on.

The yaml files are the registry: a group's choices are the files of its folder, here and in every
folder given as `--config-dir`. No torch is imported: typos show at once.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_rl.assets import anchor_paths
from ctrl_rl.errors import ConfigError, RunError, did_you_mean, one_line
from ctrl_rl.runs.overrides import in_hydras_words, key_of, parse

if TYPE_CHECKING:
    from omegaconf import DictConfig

_DEEPEST = 50  # levels
_LARGEST = 4 * 2**20  # bytes of a run's config; thousands of prompts take one
# What runs of earlier versions have, and what it is now.
_PARTIAL_LOGGER = "\n  _partial_: true"
_MOVED = {
    "_target_: ctrl_rl.critics.": "_target_: ctrl_rl.agents.parts.critics.",
    f"_target_: ctrl_rl.runs.no_logger{_PARTIAL_LOGGER}": "_target_: ctrl_rl.runs.loggers.NoLog",
    f"_target_: ctrl_rl.runs.folder.no_logger{_PARTIAL_LOGGER}": (
        "_target_: ctrl_rl.runs.loggers.NoLog"
    ),
    f"_target_: torchrl.record.CSVLogger{_PARTIAL_LOGGER}": "_target_: ctrl_rl.runs.loggers.CsvLog",
    f"_target_: torchrl.record.TensorboardLogger{_PARTIAL_LOGGER}": (
        "_target_: ctrl_rl.runs.loggers.TensorboardLog"
    ),
    f"_target_: torchrl.record.WandbLogger{_PARTIAL_LOGGER}": (
        "_target_: ctrl_rl.runs.loggers.WandbLog"
    ),
    "_target_: ctrl_rl.data.sources.": "_target_: ctrl_rl.data.",
}


def config_folder() -> Path:
    """Folder of the project's own configs."""
    import ctrl_rl.configs

    return Path(ctrl_rl.configs.__path__[0])


def files(group: str, extra: Sequence[str] = ()) -> dict[str, Path]:
    """The yamls of a group by name: the project's, then those of extra config folders."""
    folders = [Path(folder) for folder in extra] + [config_folder()]
    yamls = [file for folder in folders for file in (folder / group).glob("*.yaml")]
    return dict(sorted(((file.stem, file) for file in yamls), key=lambda pair: pair[0]))


def groups(extra: Sequence[str] = ()) -> list[str]:
    """Names of all config groups."""
    folders = [config_folder(), *(Path(folder) for folder in extra)]
    names = {path.name for folder in folders for path in folder.iterdir()}
    return sorted(name for name in names if files(name, extra))


def defaults(name: str) -> dict[str, str]:
    """Groups of a main config, such as `train`, and the default of each."""
    text = (config_folder() / f"{name}.yaml").read_text()
    chosen: dict[str, str] = {}
    for other in re.findall(r"^  - ([a-z]\w*)(?: #.*)?$", text, re.MULTILINE):
        chosen |= defaults(other)  # of a main config that this one extends
    return chosen | dict(re.findall(r"^  - (\w+): (\S+)", text, re.MULTILINE))


def check_folders(extra: Sequence[str]) -> None:
    """Raise `ConfigError` if a `--config-dir` is not a folder."""
    for folder in extra:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder} is not a folder")


def compose(name: str, overrides: Sequence[str], extra: Sequence[str] = ()) -> "DictConfig":
    """Compose a main config with overrides.

    Args:
        name: `train`, `pretrain` or `classifier`: a yaml at the top of the config folder.
        overrides: Hydra overrides, such as ``agent=ctrl`` or ``trainer.updates=100``.
        extra: more config folders, searched after the project's; for plug-ins outside of it.

    Returns:
        The resolved config; its `choices` hold the choice of every group. Existing relative paths
        of its parts are absolute.

    Raises:
        ConfigError: an unknown group, choice, key or a missing value, with the nearest match.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    check_folders(extra)
    _check_choices(name, overrides, extra)
    _check_added(name, overrides, extra)
    search = ",".join(f"'file://{Path(folder).resolve()}'" for folder in extra)
    try:
        folder = str(config_folder())
        with _set_aside(), hydra.initialize_config_dir(folder, version_base="1.3"):
            words = [f"hydra.searchpath=[{search}]", *in_hydras_words(overrides, defaults(name))]
            composed = hydra.compose(name, words, return_hydra_config=True)
        OmegaConf.set_struct(composed, False)
        picked = composed.pop("hydra").runtime.choices
        none = {group: None for group, choice in defaults(name).items() if choice == "null"}
        composed.choices = none | {key: each for key, each in picked.items() if "/" not in key}
        OmegaConf.resolve(composed)
    except InterpolationKeyError as error:
        raise ConfigError(_no_source(error, composed)) from error
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        unknown = re.search(r"Could not override '([^']+)'", str(error))
        if unknown:
            key = unknown.group(1)
            good = [other for other in overrides if key_of(other) != key]
            if len(good) == len(overrides):  # the word is in a file
                raise ConfigError(one_line(error)) from error
            raise ConfigError(_unknown(key, compose(name, good, extra))) from error
        open_choice = re.search(r"You must specify '(\w+)'", str(error))
        if open_choice:
            group = open_choice[1]
            known = ", ".join(files(group, extra))
            raise ConfigError(f"no value for {group}; add {group}=…, one of {known}") from error
        raise ConfigError(one_line(error)) from error
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"no value for {missing[0]}; add {missing[0]}=…")
    anchor_paths(composed)
    OmegaConf.set_struct(composed, True)
    return composed


@contextmanager
def _set_aside() -> Iterator[None]:
    """Leave Hydra to this module for a while: a user's program may be an app of it itself."""
    from hydra.core.global_hydra import GlobalHydra

    own, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = own


def saved(file: Path, overrides: Sequence[str] = (), *, trust: Sequence[str] = ()) -> "DictConfig":
    """A run's config, safe to build: it names no code but the project's and what is trusted.

    Args:
        file: config.yaml of a run folder.
        overrides: of keys that it has.
        trust: modules and packages of the user that it may name too.

    Raises:
        RunError: the file is damaged, or names other code.
        ConfigError: an override of a key that it does not have.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ctrl_rl.runs.trust import check_trusted

    config = stored(file)
    for word in overrides:
        parsed = parse(word)
        try:
            OmegaConf.update(config, parsed.key_or_group, parsed.value())
        except OmegaConfBaseException as error:
            raise ConfigError(_unknown(parsed.key_or_group, config)) from error
    check_trusted(config, file, trust)
    return config


def stored(file: Path) -> "DictConfig":
    """A run's config, to read and not to build: it may name any code.

    Raises:
        RunError: the file is damaged.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is larger than any config of a run")
        text = file.read_text()
        _check_plain(text)
        for old, new in _MOVED.items():
            text = text.replace(old, new)
        config = OmegaConf.create(text)
    except (
        OSError,
        ValueError,
        RecursionError,
        AttributeError,
        TypeError,
        OmegaConfBaseException,
        YAMLError,
    ) as error:
        raise RunError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise RunError(f"{file} is not the config of a run; restore it or train anew")
    OmegaConf.set_struct(config, True)
    return config


def _check_plain(text: str) -> None:
    """Refuse yaml that takes gigabytes or hours to read, before it is read."""
    import yaml

    depth = 0
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has yaml aliases, as no config of a run has")
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def _check_choices(name: str, overrides: Sequence[str], extra: Sequence[str]) -> None:
    """Refuse unknown choices by name before Hydra does so in a paragraph."""
    known = defaults(name)
    for word in overrides:
        parsed = parse(word)
        group = parsed.key_or_group
        if group in known and not parsed.is_delete():
            chosen, accepted = parsed.value(), list(files(group, extra))
            accepted += ["null"] if known[group] == "null" else []
            chosen = "null" if chosen is None else str(chosen)
            if chosen not in accepted:
                raise ConfigError(f"unknown {group} '{chosen}'; {did_you_mean(chosen, accepted)}")


def _check_added(name: str, overrides: Sequence[str], extra: Sequence[str]) -> None:
    """Refuse a key that is added beside the groups, where nothing reads it."""
    added = [word for word in overrides if word.startswith("+")]
    tops = {key_of(word).partition(".")[0] for word in added} - set(defaults(name))
    if tops:
        known = list(compose(name, [word for word in overrides if word not in added], extra))
        for top in sorted(tops - set(known)):
            raise ConfigError(f"unknown key '{top}'; {did_you_mean(top, known)}")


def _no_source(error: Exception, config: "DictConfig") -> str:
    """Message for a value that is taken from another key, which is not there."""
    from omegaconf import OmegaConf

    missing = str(error).split("'")[1]
    takers = [key for key, text in _texts(OmegaConf.to_container(config)) if missing in text]
    group = missing.partition(".")[0]
    where = f" of {group}={config.choices[group]}" if group in config.choices else ""
    return (
        f"{takers[0] if takers else 'a value'} is taken from {missing}, which is no key{where}; "
        "give it a value, or make another choice of either"
    )


def _texts(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values that take something from another key."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _texts(value, f"{prefix}{key}.")
        elif "${" in str(value):
            yield f"{prefix}{key}", str(value)


def _unknown(key: str, config: "DictConfig") -> str:
    """Message for an unknown key: names the nearest of the keys beside it."""
    parent = key.rpartition(".")[0]
    known = [other for other in _keys(config) if other.partition(".")[0] != "choices"]
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    if key in known:
        return f"{key} is filled entry by entry; write +{key}.NAME=… for each"
    if not siblings and parent in known and config[parent] == {}:
        return f"{parent} is empty; write +{key}=… to add to it"
    hint = did_you_mean(key, siblings or [other for other in known if "." not in other])
    return f"unknown key '{key}'; {hint}"


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config."""
    for key in config:
        yield f"{prefix}{key}"
        if hasattr(config[key], "keys"):
            yield from _keys(config[key], f"{prefix}{key}.")
