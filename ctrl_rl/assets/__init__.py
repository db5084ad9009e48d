"""Weights shipped with the package, and how config paths find these and others."""

from importlib.resources import files
from pathlib import Path

from ctrl_rl.errors import ConfigError, one_line

_SCHEME = "package://"


def resolve(path: str | Path) -> Path:
    """Turn a config path into a real one.

    Args:
        path: a path, relative to the working directory, or ``package://digits/prior`` for a folder
            of weights inside the package.
    """
    text = str(path)
    if text.startswith(_SCHEME):
        return Path(str(files("ctrl_rl.assets"))) / text.removeprefix(_SCHEME)
    return Path(text).expanduser()


def unreachable(setting: str, path: str, what: str, error: Exception) -> ConfigError:
    """The error for a model that is neither on disk nor on the hub.

    Args:
        setting: dotted name of the config's entry.
        path: its value, a folder or an id on the hub.
        what: what the folder must be.
        error: of the library that tried.
    """
    reason = one_line(error, 200)
    return ConfigError(
        f"{setting}={path} is neither {what} here nor could it be had from the hub "
        f"({type(error).__name__}: {reason}); give the path of such a folder. A model behind a "
        f"licence asks you to accept it first: https://huggingface.co/{path}"
    )
