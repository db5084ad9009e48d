"""Pictures that people have, as pixels of one shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError, check_choice, one_line

if TYPE_CHECKING:
    from PIL.Image import Image as Opened

# Pillow's modes: as stored, as read.
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
_CHANNELS = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Picture:
    """A labelled picture that is not read yet.

    Attributes:
        where: What messages call it: its file, and the row that names it.
        open: Opens its bytes.
        label: Its label as text.
    """

    where: str
    open: Callable[[], IO[bytes]]
    label: str


@dataclass(frozen=True, kw_only=True)
class PictureReader:
    """Reads pictures upright, opaque and of one shape.

    Attributes:
        size: Height and width to resize pictures to; None if all have one size.
        channels: 1 for grey, 3 for RGB; None if all pictures are alike.
        background: Colour behind transparent pixels, a name or "#rrggbb".

    Raises:
        ConfigError: If one of them is not what it must be.
    """

    size: Sequence[int] | None = None
    channels: int | None = None
    background: str = "white"

    def __post_init__(self) -> None:
        """Check the settings."""
        from PIL import ImageColor

        if self.size is not None:
            sides = list(self.size) if isinstance(self.size, Sequence) else self.size
            is_pair = isinstance(sides, list) and len(sides) == 2
            if not is_pair or not all(isinstance(side, int) and side > 0 for side in sides):
                raise ConfigError(f"dataset.size={sides} must be [height, width], in pixels")
        if self.channels is not None:
            check_choice("dataset.channels", str(self.channels), map(str, _CHANNELS))
        try:
            ImageColor.getrgb(str(self.background))
        except ValueError as error:
            raise ConfigError(
                f"dataset.background={self.background} must be a colour such as white or '#808080'"
            ) from error

    def read(self, pictures: Sequence[Picture]) -> Tensor:
        """All pixels, uint8 [N, 1 or 3, H, W].

        Raises:
            ConfigError: A picture cannot be read, has a mode that is neither grey nor RGB with 8
                bits, or another shape than the first.
        """
        first = self._pixels(pictures[0])
        # Filled one by one: a list of arrays, and their stack, would take the memory twice.
        whole = np.empty((len(pictures), *first.shape), np.uint8)
        for place, picture in enumerate(pictures):
            pixels = self._pixels(picture) if place else first
            if pixels.shape != first.shape:
                raise ConfigError(
                    f"{pictures[0].where} is {_shape(first)} and {picture.where} is "
                    f"{_shape(pixels)}: give dataset.size=[height,width] and dataset.channels=1 "
                    "or 3 to make them one"
                )
            whole[place] = pixels
        return torch.from_numpy(whole)

    def _pixels(self, picture: Picture) -> np.ndarray:
        """Pixels [1 or 3, H, W] of one picture."""
        from PIL import Image, ImageOps

        try:
            with warnings.catch_warnings(), picture.open() as file:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as opened:
                    opened.load()
                    upright = ImageOps.exif_transpose(opened)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ConfigError(f"{picture.where} is too large ({error}): shrink it first") from error
        except Exception as error:  # decoders raise many kinds for a damaged file
            raise ConfigError(
                f"{picture.where} cannot be read ({one_line(error, 200)}): save it anew as PNG or "
                "JPEG, or remove it"
            ) from error
        if upright.mode not in _MODES:
            raise ConfigError(
                f"{picture.where} has mode {upright.mode}, but must be grey or RGB with 8 bits a "
                "channel: convert it first"
            )
        flat = self._opaque(upright)
        if self.channels is not None:
            flat = flat.convert(_CHANNELS[self.channels])
        if self.size is not None:
            height, width = self.size
            flat = flat.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(flat, dtype=np.uint8)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _opaque(self, image: Opened) -> Opened:
        """The image in front of the background, grey or RGB."""
        from PIL import Image, ImageColor

        mode = _MODES[image.mode]
        if not image.has_transparency_data:
            return image.convert(mode)
        colour: Any = ImageColor.getrgb(self.background)[:3]
        if len(set(colour)) > 1:
            mode = "RGB"
        behind = Image.new("RGBA", image.size, (*colour, 255))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert(mode)


def _shape(pixels: np.ndarray) -> str:
    channels, height, width = pixels.shape
    return f"{'grey' if channels == 1 else 'colour'}, {height} x {width}"
