"""Check that the values of a config fit their targets, before anything is built.

The annotations of a class or function are the schema of its yaml, for plug-ins as well: unknown
keys, missing keys and values of another type are refused by their dotted name.
"""

import inspect
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ctrl_rl.errors import ConfigError, did_you_mean, import_hint

_SCALARS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("text", (str,)),
    type(None): ("null", (type(None),)),
}


def check_node(node: Any, where: str, given: Collection[str] = ()) -> None:
    """Check a node with a `_target_` against it, and all nodes inside.

    Args:
        node: of a config, as plain Python.
        where: its dotted name, for messages.
        given: names of the arguments that the program adds.

    Raises:
        ConfigError: as `check_arguments`, or the target cannot be imported.
    """
    from hydra.utils import get_object

    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    values = {str(key): value for key, value in node.items() if not str(key).startswith("_")}
    if "_target_" in node:
        try:
            target = get_object(node["_target_"])
        except Exception as error:  # importing a plug-in may raise anything
            reason = import_hint(str(node["_target_"]), error)
            raise ConfigError(f"{where}._target_={node['_target_']} fails: {reason}") from error
        check_arguments(target, values, where, given)
    for key, value in values.items():
        # What an agent builds itself, such as its critic, gets the agent's task.
        partial = isinstance(value, dict) and value.get("_partial_", False)
        check_node(value, f"{where}.{key}", ("task",) if partial else ())


def check_arguments(
    target: Callable[..., Any], values: Mapping[str, Any], where: str, given: Collection[str] = ()
) -> None:
    """Check the arguments that a config gives to `target`.

    Args:
        target: class or function.
        values: arguments from the config.
        where: dotted name of the config node, for messages.
        given: names of the arguments that the program adds.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    parameters = inspect.signature(target).parameters.values()
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    accepted = [f"{where}.{name}" for name in named if name not in given]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in values:
        if name not in named and not takes_all:
            key = f"{where}.{name}"
            raise ConfigError(f"unknown key '{key}'; {did_you_mean(key, accepted)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in values and name not in given:
            raise ConfigError(f"no value for {where}.{name}; add {where}.{name}=…")
    hints = _hints(target)
    for name, value in values.items():
        check_value(value, hints.get(name, Any), f"{where}.{name}")


def check_value(value: Any, hint: Any, where: str) -> None:
    """Raise `ConfigError` if the value of the key `where` is not of the annotated type."""
    if get_origin(hint) in (dict, Mapping) and isinstance(value, Mapping):
        for name, entry in value.items():
            check_value(entry, get_args(hint)[1], f"{where}.{name}")
    elif not _fits(value, hint):
        shown = "null" if value is None else value
        wanted = _describe(hint)
        odd = "number" in wanted and not all(map(_is_ordinary, _numbers(value)))
        more = ", finite and below 2^63" if odd else ""
        raise ConfigError(f"{where}={shown} must be {wanted}{more}")


def folder_of(value: Any, where: str) -> Path:
    """The folder that the key `where` of a config names."""
    check_value(value, str | int, where)
    return Path(str(value)).expanduser()


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # a plug-in whose annotations exist for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain yaml value fits; true for every annotation that yaml cannot express."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        if hint not in (int, float):
            return isinstance(value, _SCALARS[hint][1])
        is_number = isinstance(value, _SCALARS[hint][1]) and not isinstance(value, bool)
        return is_number and _is_ordinary(value)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin in (dict, Mapping):
        is_mapping = isinstance(value, Mapping)
        return is_mapping and all(_fits(entry, inner[1]) for entry in value.values())
    if origin is tuple and Ellipsis not in inner:
        fits = isinstance(value, list | tuple) and len(value) == len(inner)
        return fits and all(_fits(*pair) for pair in zip(value, inner, strict=True))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(entry, inner[0]) for entry in value)
    return True


def _is_ordinary(number: float) -> bool:
    """Whether a number is finite and, if it is whole, one that tensors can hold."""
    return -(2**63) <= number < 2**63 if isinstance(number, int) else math.isfinite(number)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a plain yaml value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int | float):
        yield value


def _describe(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint][0]
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in inner)
    if origin is Literal:
        return " or ".join(str(option) for option in inner)
    if origin in (dict, Mapping):
        return f"a mapping {{name: {_describe(inner[1])}}}"
    if origin is tuple and Ellipsis not in inner:
        return f"a list [{', '.join(_describe(option) for option in inner)}]"
    if origin in (list, tuple, Sequence):
        return f"a list [{_describe(inner[0])}, …]"
    return getattr(hint, "__name__", str(hint))
