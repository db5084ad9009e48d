"""Inputs of pretrained rewards: transformers, model paths, weight files, linear heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ctrl_rl.assets import resolve
from ctrl_rl.errors import ConfigError, one_line


def transformers_package() -> Any:
    """The package, which is an optional dependency.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            'a pretrained reward needs a package that is not here: pip install "ctrl-rl[pipelines]"'
        ) from error
    return transformers


def source(path: str) -> str:
    """The argument of transformers' `from_pretrained`: an existing folder, or else an id."""
    folder = resolve(path)
    return str(folder) if folder.is_dir() else path


def read_weights(setting: str, file: Path) -> dict[str, Tensor]:
    """Tensors of a file, safetensors or a torch file of plain tensors, by name.

    Args:
        setting: name of the config's entry, for errors.
        file: an existing file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        weights = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # from a broken file, pickled objects
        reason = one_line(error, 200)
        raise ConfigError(
            f"{setting}={file} cannot be read as weights ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{setting}={file} holds one {type(weights).__name__}, not named tensors")
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}


def linear_head(weights: Mapping[str, Tensor], features: int, where: str) -> nn.Sequential:
    """Linear layers without activations between them, from features [B, F] to a score [B, 1].

    Args:
        weights: with names such as "layers.0.weight", in the order of their numbers, or a single
            layer's bare "weight"; others are ignored.
        features: F.
        where: what has the weights, such as "head=file.pth", for errors.

    Raises:
        ConfigError: they do not lead from F numbers to one.
    """
    ends = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    try:
        layers = []
        for end in sorted(ends, key=lambda end: int(end.rstrip(".").rpartition(".")[2] or 0)):
            weight, bias = weights[f"{end}weight"].float(), weights[f"{end}bias"].float()
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
        head = nn.Sequential(*layers).requires_grad_(False)
        fits = head(torch.zeros(1, features)).shape == (1, 1)
    except Exception as error:  # from names without numbers, layers that do not fit
        reason = one_line(error, 200)
        raise ConfigError(
            f"{where} is no head for features of {features} numbers "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not fits:
        raise ConfigError(f"{where} does not end in one score")
    return head
