"""Which code the config of a saved run may name.

A config names classes and functions, and building it calls them: a run from elsewhere could call
anything. Only parts of this project are built, and what the user names by `trust=my_package` or in
the environment variable CTRL_RL_TRUST. Everything else is refused by name before it is imported.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from ctrl_rl.errors import ConfigError, RunError

VARIABLE = "CTRL_RL_TRUST"
# The packages whose classes, and whose exported functions, a run is built of.
_PARTS = frozenset(
    f"ctrl_rl.{name}"
    for name in (
        "agents",
        "classifiers",
        "controls",
        "data",
        "envs",
        "kernels",
        "methods",
        "networks",
        "policies",
        "priors",
        "rewards",
        "runs.loggers",
    )
)
# Of other libraries, what the project's own configs name.
_CLASS_BY_PATH = "hydra.utils.get_class"
_OF_LIBRARIES = frozenset({"torchrl.objectives.SACLoss", "torchrl.objectives.SoftUpdate"})


def check_trusted(config: DictConfig, file: Path, trust: Sequence[str] = ()) -> None:
    """Refuse a saved config that names code which is neither the project's nor trusted.

    Args:
        config: of a run.
        file: where it lies, for messages.
        trust: names of modules and packages.

    Raises:
        RunError: it does, by the name of the setting and of the code.
        ConfigError: `trust` has something else than dotted names.
    """
    trusted = _names([*trust, *os.environ.get(VARIABLE, "").split(",")])
    if _interpolations(config):
        raise RunError(f"{file} has interpolations (${{…}}), which the config of no run has")
    for where, name in _code(OmegaConf.to_container(config, resolve=False), ""):
        if not isinstance(name, str) or not _is_allowed(name, trusted):
            module = _module_of(str(name))
            raise RunError(
                f"{file}: {where} names {name}, which is not a part of ctrl_rl: building the run "
                f"would run it. If you know it and trust it, add trust={module}"
            )


def own_modules(config: DictConfig) -> list[str]:
    """Modules outside the project that a config needs, for the command that resumes the run."""
    code = _code(OmegaConf.to_container(config, resolve=True), "")
    names = [str(name) for _, name in code if not _is_allowed(str(name), ())]
    return sorted({_module_of(name) for name in names})


def _names(given: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for name in given]
    for name in names:
        if name and not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                f"trust={name} is not the name of a module; write it as in import, such as "
                "trust=my_package or trust=[my_rewards,my_networks]"
            )
    return tuple(name for name in names if name)


def _interpolations(config: Any) -> bool:
    if not OmegaConf.is_config(config) or config._is_none() or config._is_missing():
        return False
    keys = config.keys() if OmegaConf.is_dict(config) else range(len(config))
    return any(
        OmegaConf.is_interpolation(config, key) or _interpolations(config._get_node(key))
        for key in keys
    )


def _code(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and name of all code that a config names."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    inside = f"{where}." if where else ""
    if "_target_" in node:
        target = node["_target_"]
        if target == _CLASS_BY_PATH:
            yield f"{inside}path", node.get("path")
        else:
            yield f"{inside}_target_", target
            # Only reached when the target is one that may be imported, as callers stop at others.
            for name in _callables(target):
                if isinstance(node.get(name), str):
                    yield f"{inside}{name}", node[name]
    for key, value in node.items():
        yield from _code(value, f"{inside}{key}")


def _callables(target: str) -> list[str]:
    """Arguments of a part of the project that take a function by its dotted name."""
    part = _located(target)
    if part is None:
        return []
    hints = get_type_hints(part.__init__ if inspect.isclass(part) else part)
    return [name for name, hint in hints.items() if name != "return" and _is_callable(hint)]


def _is_callable(hint: Any) -> bool:
    return get_origin(hint) is Callable or any(map(_is_callable, get_args(hint)))


def _is_allowed(name: str, trusted: Sequence[str]) -> bool:
    if name in _OF_LIBRARIES or _located(name) is not None:
        return True
    inside = [each for each in trusted if name.startswith(f"{each}.")]
    return bool(inside) and _defined_in(name, trusted)


def _located(name: str) -> Any:
    """The part of the project that is called so, or None."""
    if not any(name.startswith(f"{package}.") for package in _PARTS):
        return None
    module, rest = _split(name)
    found = module
    for each in rest:
        found = getattr(found, each, None)
        if found is None or inspect.ismodule(found):  # a module that another one imported
            return None
    if not _of_parts(found):
        return None
    if inspect.isclass(found):
        return found
    if inspect.ismethod(found) and inspect.isclass(found.__self__):  # such as Classifier.load
        return found
    # Functions that packages export make parts; others may write files.
    return found if inspect.isfunction(found) and hasattr(module, "__path__") else None


def _of_parts(found: Any) -> bool:
    module = getattr(found, "__module__", None) or ""
    return any(f"{module}.".startswith(f"{package}.") for package in _PARTS)


def _defined_in(name: str, trusted: Sequence[str]) -> bool:
    """Whether a trusted module defines what it is asked for, and not merely imports it."""
    try:
        found, rest = _split(name)
        for each in rest:
            found = getattr(found, each)
            if inspect.ismodule(found):
                return False
    except (ImportError, AttributeError):
        return True  # building it says what is missing
    module = getattr(found, "__module__", None) or type(found).__module__
    return any(f"{module}.".startswith(f"{each}.") for each in (*trusted, *_PARTS))


def _split(name: str) -> tuple[Any, list[str]]:
    """The innermost module of a dotted name, imported, and the rest of the name."""
    parts = name.split(".")
    module = import_module(parts[0])
    for index, part in enumerate(parts[1:], start=1):
        try:
            module = import_module(f"{module.__name__}.{part}")
        except ModuleNotFoundError:
            return module, parts[index:]
    return module, []


def _module_of(name: str) -> str:
    return name.rpartition(".")[0] or name
