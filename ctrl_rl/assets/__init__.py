"""Weights shipped with the package, and how config paths find these and others."""

import os
from collections.abc import MutableMapping, MutableSequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ctrl_rl.errors import ConfigError, one_line

_SCHEME = "package://"
# What a part of the project, or one of the user's, calls a file or folder in its yaml; alone, or
# at the end of a name such as weights_file.
_PATHS = frozenset({"file", "folder", "head", "path", "processor", "tokenizer", "weights"})


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


def anchor_paths(node: Any) -> None:
    """Make paths of a config absolute, in place, so that it means the same in every folder.

    They are the texts called so in a node with a `_target_` that exist under the working directory;
    ids on the hub, ``package://`` and what is not there stay as they are.

    Args:
        node: a config, or a part of one: mappings, lists and plain values.
    """
    if isinstance(node, MutableMapping):
        # Hydra's own targets take dotted names of code as `path`.
        is_part = "_target_" in node and not str(node["_target_"]).startswith("hydra.")
        for key, value in node.items():
            if not isinstance(value, str):
                anchor_paths(value)
            elif is_part and str(key).rpartition("_")[2] in _PATHS and os.path.exists(value):
                node[key] = str(Path(value).absolute())  # links stay: their names may matter
    elif isinstance(node, MutableSequence):
        for value in node:
            anchor_paths(value)


def unreachable(setting: str, path: str, what: str, error: Exception) -> ConfigError:
    """The error for a model that cannot be read from disk, or had from the hub.

    Args:
        setting: dotted name of the config's entry.
        path: its value, a folder or an id on the hub.
        what: what the folder must be.
        error: of the library that tried.
    """
    reason = f"{type(error).__name__}: {one_line(error, 200)}"
    folder = resolve(path)
    if not folder.is_dir():
        return ConfigError(
            f"{setting}={path} is neither {what} here nor could it be had from the hub ({reason}); "
            "give the path of such a folder. A model behind a licence asks you to accept it first: "
            f"https://huggingface.co/{path}"
        )
    pickled = pickles(folder)
    if pickled and "safetensors" in str(error):
        return only_pickles(setting, path, pickled[0])
    return ConfigError(f"{setting}={path} cannot be read as {what} ({reason})")


def pickles(folder: Path) -> list[Path]:
    """Files of pickled weights in a folder and its subfolders, without safetensors beside them."""
    found = (file for end in ("bin", "pt", "pth", "ckpt") for file in folder.rglob(f"*.{end}"))
    return sorted(file for file in found if not any(file.parent.glob("*.safetensors")))


def only_pickles(setting: str, path: str, file: Path) -> ConfigError:
    """The error for a model whose weights would be unpickled.

    Args:
        setting: dotted name of the config's entry.
        path: its value.
        file: of pickled weights.
    """
    return ConfigError(
        f"{setting}={path} has no safetensors beside {file.name} in {file.parent}, and weights are "
        "not unpickled here, as that may run anything; if you trust it, convert it once: load it "
        "with its own library, use_safetensors=False, and save it by save_pretrained"
    )
