"""Weights that come with the package, and how config paths find them."""

from importlib.resources import files
from pathlib import Path

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
