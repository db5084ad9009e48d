"""How well an image compresses, in classes: the paper's control, by the encoder itself."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError


def jpeg_kilobytes(image: Tensor, quality: int = 95) -> Tensor:
    """Sizes as JPEG files.

    Args:
        image: [B, 3, H, W] or [B, 1, H, W] in [-1, 1]; what lies beyond is clamped.
        quality: of the encoder, 1 to 95 (Pillow's scale).

    Returns:
        [B] float32 on the images' device, in units of 1000 bytes; no gradient.

    Raises:
        ConfigError: not a batch of images with one or three channels.
    """
    from PIL import Image

    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ConfigError(
            f"samples of shape {tuple(image.shape[1:])} are no images; JPEG sizes need "
            "[1, H, W] or [3, H, W]"
        )
    pixels = (image.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).squeeze(-1).numpy(force=True)

    def size(array: Any) -> int:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        return file.tell()

    # Pillow encodes one image at a time, and lets go of the interpreter while it does.
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size, arrays))
    return torch.tensor(sizes, dtype=torch.float32, device=image.device) / 1000


class JpegSize(nn.Module):
    """Classes of compressibility, which is minus the size of an image as a JPEG file.

    Zhao et al. (ICLR 2025, arXiv 2406.12120) use four classes of 512 x 512 images at quality 95:
    below -110, to -85, to -60 and above, in kB. The size is taken as measured with a normal error,

        p(y | x) = P( edge_y <= -size(x) + std * noise < edge_{y+1} ),

    so that log-probabilities are finite everywhere and tell which way a class lies. The most
    probable label is the class itself, to within the error; as a held-out judge this is the oracle.

    Args:
        edges: between the classes, in kB, negative and ascending.
        std: of the error, kB, > 0.
        quality: of the encoder.

    Raises:
        ConfigError: edges that do not ascend, or a value out of range.
    """

    differentiable = False
    edges: Tensor

    def __init__(
        self,
        *,
        edges: Sequence[float] = (-110.0, -85.0, -60.0),
        std: float = 5.0,
        quality: int = 95,
    ) -> None:
        super().__init__()
        if not edges or any(not low < high for low, high in pairwise(edges)):
            raise ConfigError(f"edges={list(edges)} must ascend, such as [-110, -85, -60] kB")
        if not std > 0:
            raise ConfigError(f"std={std} kB must be > 0")
        if not 1 <= quality <= 95:
            raise ConfigError(f"quality={quality} must be 1 to 95, the range of JPEG encoders")
        self.num_labels, self.std, self.quality = len(edges) + 1, float(std), quality
        self.register_buffer("edges", torch.tensor([float(edge) for edge in edges]))

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, L] of images [B, C, H, W], in nats."""
        distance = (self.edges + jpeg_kilobytes(x, self.quality)[:, None]) / self.std
        first, last = distance[:, :1], distance[:, -1:]
        # Of a class between two edges: a difference of two tails on the side where both are small.
        low, high = distance[:, :-1].double(), distance[:, 1:].double()
        upper = low + high > 0
        below = torch.where(upper, -high, low), torch.where(upper, -low, high)
        tail, whole = (torch.special.log_ndtr(each) for each in below)
        between = whole + torch.log(-torch.expm1(tail - whole))
        parts = (torch.special.log_ndtr(first), between, torch.special.log_ndtr(-last))
        return torch.cat([part.float() for part in parts], dim=1)
