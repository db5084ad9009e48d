"""denoising.gif: how noise becomes a sample, without control and with it."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctrl_rl.evaluation.sheets import LEAST, MOST, Row, sheet, tile_size
from ctrl_rl.evaluation.side_by_side import Comparison, Strip
from ctrl_rl.pixels import to_pixels

NO_FILM = "no film: the latents of this prior are no images of the samples' shape"
MOST_BYTES = 2_000_000
_MOST_PIXELS = 4 * MOST_BYTES  # a pixel of noise takes more than a quarter of a byte
_MOST_STEPS = 60  # latents in a film, spread evenly over longer chains
_MOST_ROWS = 4  # conditions
_STEPS_MS, _END_MS = (60, 4000, 300), 1500  # a step: at least, all together, at most; the end
_TEXT_GREYS = 16
# Columns, colours and largest tile width in pixels, tried until the film is small enough.
_TRIES = [(8, 240, MOST), (8, 64, MOST), (6, 64, LEAST), (4, 64, LEAST), (4, 32, 32), (2, 16, 32)]


def strips_of(compared: Sequence[Comparison]) -> list[Strip]:
    """The strips in an evaluation's film: the first comparison, at most four conditions."""
    return [compared[0].before, *compared[0].after[:_MOST_ROWS]]


def draw_film(path: Path, strips: Sequence[Strip]) -> bool:
    """Draw a film of strips from the same noise, the pretrained model's first.

    It has one frame for every latent x_0, ..., x_K, clamped to [-1, 1], and a long last one for the
    clean samples. Beyond 60 steps some are left out. Above 2 MB it has fewer columns and colours.

    Args:
        path: GIF to write.
        strips: one row each.

    Returns:
        Whether there is a film: samples must be images, and latents images of the same shape.
    """
    first = strips[0]
    if first.samples.ndim != 4 or first.latents.shape[2:] != first.samples.shape[1:]:
        return False
    for columns, colours, most in _TRIES:
        content = _film(strips, columns, colours, most)
        if content is not None and len(content) <= MOST_BYTES:
            path.write_bytes(content)
            return True
    return False


def _film(strips: Sequence[Strip], columns: int, colours: int, most: int) -> bytes | None:
    """The file, or None if it would be far too large."""
    last = strips[0].latents.shape[1] - 1
    columns = min(columns, len(strips[0].samples))
    chosen = np.unique(np.linspace(0, last, min(last, _MOST_STEPS) + 1).round().astype(int))
    height, width = strips[0].samples.shape[-2:]
    across, down = tile_size((width, height), most)
    if len(chosen) * len(strips) * columns * across * down > _MOST_PIXELS:
        return None
    moments = [(f"step {k} of {last}", [s.latents[:columns, k] for s in strips]) for k in chosen]
    moments.append(("finished", [s.samples[:columns] for s in strips]))
    noisy = [latents for _, sets in moments[:-1] for latents in sets]
    palette = _palette([noisy, moments[-1][1]], colours)
    frames = []
    for title, sets in moments:
        rows = [Row(strip.title, [given]) for strip, given in zip(strips, sets, strict=True)]
        frame = sheet(rows, [columns], title=title, most=most)
        frames.append(_in_colours(frame, palette))
    least, together, longest = _STEPS_MS
    each = min(max(together // len(chosen), least), longest)
    file = io.BytesIO()
    frames[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[each] * len(chosen) + [_END_MS],
        loop=0,
    )
    return file.getvalue()


def _in_colours(frame: Image.Image, palette: np.ndarray) -> Image.Image:
    """The frame in the nearest colours of a palette [n, 3]; Pillow's own are not the nearest."""
    pixels = np.asarray(frame).reshape(-1, 3).astype(np.int32)
    packed = (pixels[:, 0] << 16) | (pixels[:, 1] << 8) | pixels[:, 2]
    has, place = np.unique(packed, return_inverse=True)
    colours = np.stack([has >> 16, (has >> 8) & 255, has & 255], 1).astype(np.float32)
    known = palette.astype(np.float32)
    nearest = ((known**2).sum(1) - 2 * colours @ known.T).argmin(1).astype(np.uint8)
    image = Image.fromarray(nearest[place].reshape(frame.height, frame.width), "P")
    image.putpalette(palette.flatten().tolist())
    return image


def _palette(parts: Sequence[Sequence[Tensor]], colours: int) -> np.ndarray:
    """One palette [n, 3] uint8 for all frames, against flicker: equally many colours per part.

    It has some greys for the text; images of one channel have no other colours.
    """
    palettes = [_greys(_TEXT_GREYS)]
    for sets in parts:
        if sets[0].shape[1] < 3:
            palettes.append(_greys(colours // len(parts)))
            continue
        seen = max(1, sets[0].shape[-1] // LEAST)  # one pixel in this many, each way
        pixels = [to_pixels(images[:, :3, ::seen, ::seen]).reshape(-1, 3) for images in sets]
        image = Image.fromarray(torch.cat(pixels)[None].cpu().numpy())
        chosen = image.quantize(colours // len(parts)).getpalette() or []
        palettes.append(np.array(chosen, np.uint8).reshape(-1, 3)[: colours // len(parts)])
    return np.concatenate(palettes)


def _greys(count: int) -> np.ndarray:
    levels = np.linspace(0, 255, count).round().astype(np.uint8)
    return np.stack([levels] * 3, 1)
