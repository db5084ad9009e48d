"""How well an image compresses: the paper's control, measured by the encoder itself."""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.pixels import check_images, to_pixels


def jpeg_kilobytes(image: Tensor, quality: int = 95) -> Tensor:
    """Sizes as JPEG files.

    Args:
        image: [B, 3, H, W] or [B, 1, H, W] in [-1, 1]; values outside are clamped.
        quality: of the encoder, 1 to 95 (Pillow's scale).

    Returns:
        [B] float32 on the images' device, in units of 1000 bytes; no gradient. NaN for an image
        with NaN or infinite values, which has no pixels.

    Raises:
        ConfigError: not a batch of images with one or three channels.
    """
    from PIL import Image

    check_images(image.shape[1:], "a JPEG size")
    arrays = to_pixels(image).squeeze(-1).numpy(force=True)

    def size(array: Any) -> int:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        return file.tell()

    # Pillow encodes one image at a time, and releases the interpreter meanwhile.
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size, arrays))
    kilobytes = torch.tensor(sizes, dtype=torch.float32, device=image.device) / 1000
    return torch.where(torch.isfinite(image).flatten(1).all(1), kilobytes, torch.nan)


class Compressibility(nn.Module):
    """Minus the size of an image as a JPEG file, in kB, as a `Measure`.

    Zhao et al. (ICLR 2025, arXiv 2406.12120) use four classes of it for 512 x 512 images at
    quality 95, with edges at -110, -85 and -60.

    Args:
        quality: of the encoder, 1 to 95.

    Raises:
        ConfigError: a quality out of range.
    """

    differentiable = False

    def __init__(self, *, quality: int = 95) -> None:
        super().__init__()
        if not 1 <= quality <= 95:
            raise ConfigError(f"quality={quality} must be 1 to 95, the range of JPEG encoders")
        self.quality = quality

    def forward(self, sample: Tensor) -> Tensor:
        """Minus the sizes [B] of images [B, C, H, W]; no gradient."""
        return -jpeg_kilobytes(sample, self.quality)
