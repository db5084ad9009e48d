"""Samples that are images, and their 8-bit pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError


def are_images(shape: Sequence[int]) -> bool:
    """Whether samples of a shape are images: [1, H, W] or [3, H, W]."""
    return len(shape) == 3 and shape[0] in (1, 3)


def check_images(shape: Sequence[int], what: str) -> None:
    """Refuse samples that are not images.

    Args:
        shape: of one sample.
        what: what needs images, for the message.

    Raises:
        ConfigError: the shape is not [1, H, W] or [3, H, W].
    """
    if not are_images(shape):
        raise ConfigError(
            f"samples of shape {tuple(shape)} are no images; {what} needs [1, H, W] or [3, H, W]"
        )


def to_pixels(sample: Tensor) -> Tensor:
    """Images [*B, C, H, W] in [-1, 1] as uint8 [*B, H, W, C]; values outside are clamped."""
    pixels = (sample.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1)
