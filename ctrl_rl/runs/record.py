"""What a config says of parts that were given as Python objects.

A class or a function that makes a part, or `functools.partial` of one, is recorded by its name and
arguments wherever Python finds it again; so is a reward function. Anything else is marked as given:
a ready object, a lambda, what a notebook defines. Whoever loads the run gives it again.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctrl_rl.controls import Control, as_control
from ctrl_rl.runs.parts import FUNCTION, GIVEN, is_function, is_maker, label_of, target_of

# What the program adds when it makes one; a class without them is complete as it is.
_ADDED = {
    "kernel": {"scheduler_config"},
    "policy": {"prior", "kernel", "controls"},
    "agent": {"task"},
}


class _Unwritable(Exception):
    """A value that no config can hold."""


def record(config: DictConfig, name: str, part: Any, **settings: Any) -> None:
    """Write a part into a config, so that it can be built again, or mark it there as given.

    Args:
        config: a resolved config.
        name: of the part.
        part: checked before.
        **settings: controls, differentiability and bound of a reward function.
    """
    if is_function(name, part):
        node = _function(part, settings)
        is_whole = node["function"] is not None
    else:
        node = _node_of(name, part)
        is_whole = bool(node)
    OmegaConf.set_struct(config, False)
    config[name] = node
    config.choices[name] = label_of(part)
    if not is_whole:
        config[GIVEN] = {**config.get(GIVEN, {}), name: label_of(part)}
    OmegaConf.set_struct(config, True)


def _controls(given: Mapping[str, Any]) -> dict[str, Any]:
    """Controls as a config writes them."""
    read = {name: as_control(value, f"controls.{name}") for name, value in given.items()}
    return {k: given[k] if isinstance(given[k], int) else read[k].as_json() for k in read}


def _function(function: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config node of a reward function; null in place of one that has no name."""
    named = _name_of(function)
    if named and "." in function.__qualname__:
        named = None  # it belongs to a class
    controls = _controls(settings["controls"])
    return {"_target_": FUNCTION, "function": named, **settings, "controls": controls}


def _node_of(name: str, part: Any) -> dict[str, Any]:
    """The config node that builds a part; empty if there is none."""
    if not is_maker(part):
        return {}
    try:
        node = _call(part)
    except _Unwritable:
        return {}
    takes = set(inspect.signature(target_of(part)).parameters)
    return {**node, "_partial_": True} if takes & _ADDED.get(name, set()) else node


def _call(part: Any) -> dict[str, Any]:
    """A node that calls a class or a function with the arguments of a partial."""
    target = target_of(part)
    name = _name_of(target)
    if name is None:
        raise _Unwritable
    node: dict[str, Any] = {"_target_": name}
    if isinstance(part, partial):
        positional = [
            each.name
            for each in inspect.signature(target).parameters.values()
            if each.kind is each.POSITIONAL_OR_KEYWORD
        ]
        if len(part.args) > len(positional):
            raise _Unwritable
        arguments = dict(zip(positional, part.args, strict=False)) | part.keywords
        node |= {key: _plain(value) for key, value in arguments.items()}
    return node


def _plain(value: Any) -> Any:
    """A value as a config holds it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, str | Path):
        if "${" in str(value) or "???" in str(value):
            raise _Unwritable  # a config would read more into it
        return str(value)
    if isinstance(value, Control):
        return value.as_json()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if inspect.isclass(value):
        return {"_target_": "hydra.utils.get_class", "path": _call(value)["_target_"]}
    if is_maker(value):
        return {**_call(value), "_partial_": True}
    raise _Unwritable


def _name_of(target: Any) -> str | None:
    """The dotted name by which Python finds a class or a function again, the shortest; or None."""
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not module or module == "__main__" or not name:
        return None
    parts = str(module).split(".")
    for length in range(1, len(parts) + 1):  # a package may export it
        package = ".".join(parts[:length])
        found: Any = sys.modules.get(package)
        for each in str(name).split("."):
            found = getattr(found, each, None)
        if found is not None and found == target:
            return f"{package}.{name}"
    return None
