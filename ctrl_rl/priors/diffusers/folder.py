"""What a pipeline's folder, or its page on the hub, says of the pipeline and its scheduler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctrl_rl.assets import resolve, unreachable
from ctrl_rl.errors import ConfigError, one_line
from ctrl_rl.files import read_json
from ctrl_rl.kernels.accepted import shown
from ctrl_rl.kernels.settings import CLASS, changed, scheduler_settings

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


def model_index(path: str) -> dict[str, Any]:
    """Contents of model_index.json: the pipeline's class, and the class of every part.

    Args:
        path: a pipeline's folder, or its id on the hub.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    from diffusers import DiffusionPipeline

    index = _read(path, INDEX, DiffusionPipeline)
    if not isinstance(index.get(CLASS), str):
        raise ConfigError(f"prior.path={path}: {INDEX} names no pipeline as its {CLASS}")
    return index


def scheduler_config(
    path: str, changes: Mapping[str, Any] | None = None, index: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Contents of scheduler_config.json with a user's changes, which are known to be read.

    Args:
        path: a pipeline's folder, or its id on the hub.
        changes: `prior.scheduler`, settings in place of the file's; null takes one out.
        index: contents of model_index.json, if there is one: it names the scheduler too.

    Raises:
        ConfigError: names the file, which is missing, broken, or of a scheduler that is not read.
    """
    from diffusers import SchedulerMixin

    found = _read(path, SCHEDULER, SchedulerMixin, subfolder="scheduler")
    config = {key: value for key, value in found.items() if key == CLASS or key[:1] != "_"}
    part = (index or {}).get("scheduler")
    named = part[-1] if isinstance(part, list) and part else None
    own = named if config.get(CLASS) is None else config[CLASS]
    config = changed({**config, CLASS: own}, changes)
    try:
        scheduler_settings(config)
    except ConfigError as error:
        raise ConfigError(f"prior.path={path}, {SCHEDULER}: {error}") from error
    if named not in (None, own) and CLASS not in (changes or {}):
        raise ConfigError(
            f"prior.path={path}: {SCHEDULER} is {own}'s, and {INDEX} names {shown(named)}; "
            f"correct one of them, or choose by prior.scheduler={{{CLASS}:{own}}}"
        )
    return config


def _read(path: str, name: str, kind: Any, **where: str) -> dict[str, Any]:
    """A json object from a folder, or from the hub by a class of diffusers."""
    folder = resolve(path)
    if folder.is_dir():
        return read_object(folder, name, path)
    try:
        return dict(kind.load_config(path, **where))
    except Exception as error:  # from the hub's client, json
        raise unreachable("prior.path", path, f"a pipeline's folder with {name}", error) from error


def read_object(folder: Path, name: str, path: str) -> dict[str, Any]:
    """A json object from a file.

    Args:
        folder: of the pipeline.
        name: of the file in it.
        path: the folder as the user wrote it, for errors.

    Raises:
        ConfigError: names the file, which is missing or holds something else.
    """
    try:
        content = read_json(folder / name)
    except FileNotFoundError as error:
        raise ConfigError(
            f"prior.path={path} has no {name}; give a diffusers pipeline's folder, such as "
            "`ctrl-rl pretrain` or a pipeline's save_pretrained writes"
        ) from error
    except (OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise ConfigError(f"prior.path={path}: {name} is no json ({reason})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"prior.path={path}: {name} holds no settings by name, as {{...}}")
    return content
