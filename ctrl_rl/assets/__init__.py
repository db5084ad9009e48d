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
