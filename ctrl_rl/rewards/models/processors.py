"""A pretrained model's own image processing, with a gradient."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctrl_rl.errors import ConfigError
from ctrl_rl.pixels import check_images

_TRIED = ((256, 256), (440, 440), (320, 480))  # heights and widths, in pixels
# Largest difference of a smooth picture, in units of a channel's standard deviation: rounding and
# other interpolation weights give 0.02, a processor that does something else 0.5 or more.
_APART = 0.1


class Pixels(nn.Module):
    """A model's own image processing, with a gradient.

    Resized, cropped from the middle and normalised as the processor's config says; interpolated in
    float where the processor rounds to whole pixels. Construction compares the two, as some
    processors do more than that.

    Args:
        processor: an image processor of transformers.
        path: of its model, for errors.

    Raises:
        ConfigError: the processor does something unknown here.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, processor: Any, path: str) -> None:
        super().__init__()
        try:
            self._read(processor)
            apart = max(self._deviation(processor, *sides) for sides in _TRIED)
        except Exception as error:  # missing attributes, or its own errors
            raise ConfigError(
                f"the image processor of {path} cannot be followed with a gradient "
                f"({type(error).__name__}: {error}); give a model with resizing, cropping and "
                "normalisation alone, such as a ViT or CLIP"
            ) from error
        if apart > _APART:
            raise ConfigError(
                f"the image processor of {path}, {type(processor).__name__}, does more than "
                "resizing, cropping and normalisation, which is all that is followed here; give "
                "another model, such as a ViT or CLIP"
            )

    def _read(self, processor: Any) -> None:
        self.size = _sides(processor.size) if processor.do_resize else None
        crops = getattr(processor, "do_center_crop", False)
        self.crop = _sides(processor.crop_size) if crops else None
        self.mode = {2: "bilinear", 3: "bicubic"}[int(processor.resample)]  # Pillow's numbers
        channels = (1, 3, 1, 1)
        normalised = processor.do_normalize
        mean = processor.image_mean if normalised else [0.0] * 3
        std = processor.image_std if normalised else [1.0] * 3
        self.register_buffer("mean", torch.tensor(mean).reshape(channels), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(channels), persistent=False)

    def _deviation(self, processor: Any, height: int, width: int) -> float:
        """Largest difference from the processor's own output on a smooth picture."""
        rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
        smooth = torch.stack([rows * columns, rows.expand(-1, width), 1 - rows * columns])
        pixels = (smooth * 255).round()
        array = pixels.permute(1, 2, 0).to(torch.uint8).numpy()
        theirs = processor(images=[array], return_tensors="pt")["pixel_values"]
        ours = self(pixels[None] / 127.5 - 1)
        return math.inf if ours.shape != theirs.shape else float((ours - theirs).abs().max())

    def forward(self, sample: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] of images [B, 1 or 3, H, W] in [-1, 1].

        Raises:
            ConfigError: the samples are not images.
        """
        check_images(sample.shape[1:], "a pretrained reward")
        image = (sample.float() / 2 + 0.5).expand(-1, 3, -1, -1)
        if self.size is not None:
            size = self.size
            if len(size) == 1:  # the shorter side
                short = min(image.shape[-2:])
                size = tuple(size[0] * side // short for side in image.shape[-2:])
            image = functional.interpolate(image, size, mode=self.mode, antialias=True)
        if self.crop is not None:
            height, width = self.crop
            if image.shape[-2] < height or image.shape[-1] < width:
                raise ConfigError(
                    f"images of {image.shape[-2]} x {image.shape[-1]} pixels are smaller than the "
                    f"{height} x {width} that this reward looks at"
                )
            image = _centre(image, height, width)
        return (image - self.mean) / self.std


def _sides(size: Any) -> tuple[int, ...]:
    """Height and width, or the shorter side alone."""
    given: Mapping[str, Any] = size if isinstance(size, Mapping) else vars(size)
    if given.get("shortest_edge"):
        return (int(given["shortest_edge"]),)
    return int(given["height"]), int(given["width"])


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]
