"""Frames of episodes, for Gymnasium's `render`.

Where samples are images, a frame is the prior's clean estimate of the current latent, decoded, in
whole pixels. Anything else is drawn as the path of the latent: its first two numbers in the plane,
or one number over the steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.pixels import are_images, to_pixels

Frame = NDArray[np.uint8]

# A power of two: MoviePy adds up the frames' durations and drops the last where that rounds down.
RENDERING: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8}
_SIDE = 256  # pixels that smaller images are enlarged to, and the side of a plot
_FINER = 2  # plots are drawn this much larger: Pillow's lines and dots have rough edges
_REACH = 4.0  # a plot shows -4 to 4: noise is N(0, I), and priors have about its scale
_INK, _FAINT, _LINES = (31, 119, 180), (158, 201, 226), (232, 232, 232)
_OTHERS, _TEXT = (178, 178, 178), (110, 110, 110)


class Camera:
    """Draws B episodes in step.

    Args:
        process: the MDP; drawing a frame leaves it as it is, the count of its calls included.
    """

    def __init__(self, process: DenoisingProcess) -> None:
        self.process = process
        self._images = are_images(process.sample_shape)
        self._path: list[Tensor] = []

    def start(self, x: Tensor) -> None:
        """See the first latents [B, *S] of new episodes."""
        self._path = []
        self.follow(x)

    def follow(self, x: Tensor) -> None:
        """See the next latents [B, *S], or the clean samples behind the last ones."""
        if not self._images:
            self._path.append(x)

    @torch.no_grad()
    def frames(self, x: Tensor, step: int, control: Mapping[str, Tensor]) -> tuple[Frame, ...]:
        """Draw the episodes.

        Args:
            x: [B, *S] current latents.
            step: 0 .. K.
            control: values by control, each [B].

        Returns:
            B frames [H, W, 3] uint8.
        """
        if not self._images:
            return self._plots(step, control)
        calls = self.process.prior_calls
        steps = torch.full((len(x),), step, device=x.device)
        sample = self.process.prior.decode(self.process.clean_estimate(x, steps, control))
        self.process.prior_calls = calls
        return _enlarged(sample)

    def _plots(self, step: int, control: Mapping[str, Tensor]) -> tuple[Frame, ...]:
        """Each episode's path, over the places of all."""
        num_steps = self.process.num_steps
        values = torch.stack(self._path).flatten(2)[:, :, :2].numpy(force=True).astype(np.float64)
        if values.shape[2] == 1:  # over the steps, and the sample, left of the numbers' labels
            time = np.linspace(-_REACH, 0.8 * _REACH, num_steps + 2)[: len(values)]
            times = np.broadcast_to(time[:, None, None], values.shape)
            values = np.concatenate([times, values], 2)
            empty = _axes(vertical=False)
        else:
            empty = _axes(vertical=True)
        places = _canvas(values)
        for place in places[-1]:
            _dot(empty, place, 5, _OTHERS)
        when = "sample" if step == num_steps else f"step {step} of {num_steps}"
        frames = []
        for episode in range(places.shape[1]):
            asked = {name: value[episode].item() for name, value in control.items()}
            canvas, path = empty.copy(), places[:, episode]
            draw = ImageDraw.Draw(canvas)
            draw.line([tuple(place) for place in path], _FAINT, 4)
            for place in path:
                _dot(canvas, place, 4, _FAINT)
            _dot(canvas, path[-1], 10, _INK)
            _write(canvas, (16, 10), f"{self.process.conditions.title(asked)}, {when}")
            frames.append(np.array(canvas.reduce(_FINER)))
        return tuple(frames)


def _enlarged(sample: Tensor) -> tuple[Frame, ...]:
    """Images [B, C, H, W] in [-1, 1], every pixel as a square of pixels."""
    pixels = to_pixels(sample).expand(-1, -1, -1, 3).numpy(force=True)
    factor = max(1, _SIDE // max(pixels.shape[1:3]))
    return tuple(image.repeat(factor, 0).repeat(factor, 1) for image in pixels)


def _canvas(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places [*N, 2] on the canvas of numbers [*N, 2]; what is out of reach is at the edge."""
    shares = values.clip(-_REACH, _REACH) * [1, -1] / (2 * _REACH) + 0.5
    margin = 0.04
    return (margin + (1 - 2 * margin) * shares) * _SIDE * _FINER


def _axes(*, vertical: bool) -> Image.Image:
    """An empty plot with a line at every second number."""
    side = _SIDE * _FINER
    canvas = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, side - 1, side - 1), outline=_LINES, width=2)
    for number in (-2, 0, 2):
        x, y = _canvas(np.array([number, number], np.float64))
        draw.line([(0, y), (side, y)], _LINES, 2)
        _write(canvas, (side - 36, y - 26), str(number))
        if vertical:
            draw.line([(x, 0), (x, side)], _LINES, 2)
            _write(canvas, (x + 6, side - 28), str(number))
    return canvas


def _dot(
    canvas: Image.Image, place: NDArray[np.float64], radius: int, colour: tuple[int, int, int]
) -> None:
    x, y = place
    ends = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(canvas).ellipse(ends, fill=colour)


def _write(canvas: Image.Image, place: tuple[float, float], text: str) -> None:
    ImageDraw.Draw(canvas).text(place, text, _TEXT, ImageFont.load_default(22))
