"""Labels that a user asks for, checked and made tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError, did_you_mean


def checked_labels(
    given: Mapping[str, int | Sequence[int] | Tensor],
    sizes: Mapping[str, int],
    n: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Labels by name, each [n] int64 on a device.

    Args:
        given: a label for all or [n] labels by name; what is missing gets its null label.
        sizes: how many labels there are of each name, without the null label behind them.
        n: number of episodes.
        device: of the result.

    Raises:
        ConfigError: a name or a label that does not exist, or another number of labels than n.
    """
    for name in given:
        if name not in sizes:
            raise ConfigError(f"unknown control '{name}'; {did_you_mean(name, sizes)}")
    checked = {}
    for name, size in sizes.items():
        label = torch.as_tensor(given.get(name, size), device=device)
        if label.is_floating_point() or ((label < 0) | (label > size)).any():
            raise ConfigError(
                f"control {name}={label.tolist()} is out of range; use whole labels 0 to "
                f"{size - 1}, or {size} for the null label"
            )
        if label.shape not in ((), (n,)):
            raise ConfigError(
                f"control {name} has shape {tuple(label.shape)}; give one label, or {n} labels"
            )
        checked[name] = label.long().expand(n).clone()
    return checked
