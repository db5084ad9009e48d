"""Sheets of images: rows of tiles with labels, on white.

Small images are enlarged by whole numbers, which makes a pixel a block of one colour; matplotlib
would resample them. Text is set in DejaVu Sans, which comes with matplotlib.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ctrl_rl.pixels import to_pixels

LEAST, MOST = 48, 96  # width of a tile in pixels: smaller images are enlarged, larger ones reduced
_BETWEEN, _APART, _BLOCKS, _MARGIN, _LABEL = 4, 12, 28, 18, 14  # pixels between things
_LEADING = 3  # pixels between lines
_INK, _FAINT = (32, 32, 32), (110, 110, 110)
_TITLE, _HEADING, _TEXT, _SMALL = ("-Bold", 15), ("-Bold", 12), ("", 12), ("", 11)  # weight, pixels


@dataclass(frozen=True)
class Row:
    """A label and one set of images [N, C, H, W] in [-1, 1] per block, or words in its place."""

    label: str
    sets: Sequence[Tensor | str]
    apart: bool = False  # more room above


@dataclass(frozen=True)
class Headings:
    """A heading of every block and smaller words under it, above the rows that follow."""

    names: Sequence[str]
    notes: Sequence[str]


def sheet(
    items: Sequence[Row | Headings],
    columns: Sequence[int],
    *,
    title: str,
    note: str = "",
    most: int = MOST,
) -> Image.Image:
    """Compose a sheet.

    Args:
        items: from top to bottom.
        columns: tiles per row of every block.
        title: of the whole sheet.
        note: smaller words under it.
        most: largest width of a tile, in pixels; wider images are reduced to it.

    Returns:
        An RGB image, large enough for all of it.
    """
    rows = [item for item in items if isinstance(item, Row)]
    shape = next(given.shape for row in rows for given in row.sets if isinstance(given, Tensor))
    width, height = tile_size((shape[-1], shape[-2]), most)
    step = width + _BETWEEN
    left = _MARGIN + max(_extent(_label(row), _TEXT)[0] for row in rows) + _LABEL
    across = [count * step - _BETWEEN for count in columns]
    starts = [left + sum(across[:place]) + place * _BLOCKS for place in range(len(columns))]
    total = max(starts[-1] + across[-1] + _MARGIN, 320)
    # Higher than any layout needs; the rest is cut off at the end.
    canvas = Image.new("RGB", (total, 400 + (height + 160) * len(items)), "white")
    draw = ImageDraw.Draw(canvas)
    y = _write(draw, (_MARGIN, _MARGIN), title, _TITLE, _INK, total - 2 * _MARGIN)
    y = _write(draw, (_MARGIN, y + 2), note, _SMALL, _FAINT, total - 2 * _MARGIN) + 12
    for item in items:
        if isinstance(item, Headings):
            below = y
            for x, room, name, words in zip(starts, across, item.names, item.notes, strict=True):
                end = _write(draw, (x, y + 12), name, _HEADING, _INK, room)
                below = max(below, _write(draw, (x, end + 1), words, _SMALL, _FAINT, room))
            y = below + 7
            continue
        y += _APART if item.apart else 0
        label = _label(item)
        wide, high = _extent(label, _TEXT)
        place = (left - _LABEL - wide, y + max(0, (height - high) // 2))
        draw.multiline_text(place, label, _INK, _font(*_TEXT), spacing=_LEADING, align="right")
        for x, room, count, given in zip(starts, across, columns, item.sets, strict=True):
            if isinstance(given, str):
                _write(draw, (x, y + height // 2 - 7), given, _SMALL, _FAINT, room)
                continue
            for column, tile in enumerate(tiles(given[:count], most)):
                canvas.paste(tile, (x + column * step, y))
        y += max(height, high) + _BETWEEN
    return canvas.crop((0, 0, total, y - _BETWEEN + _MARGIN))


def tile_size(size: tuple[int, int], most: int = MOST) -> tuple[int, int]:
    """Width and height at which an image of a given size is shown."""
    width, height = size
    if width > most:
        return most, max(1, round(height * most / width))
    factor = max(1, min(-(-LEAST // width), most // width))
    return factor * width, factor * height


def tiles(sample: Tensor, most: int = MOST) -> list[Image.Image]:
    """Images [N, C, H, W] in [-1, 1] as tiles; only the first one or three channels are shown."""
    sample = sample.detach().cpu()
    channels = 3 if sample.shape[1] >= 3 else 1
    pixels = to_pixels(sample[:, :channels]).expand(-1, -1, -1, 3).numpy()
    size = tile_size((sample.shape[-1], sample.shape[-2]), most)
    smaller = size[0] < sample.shape[-1]
    how = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    images = (Image.fromarray(np.ascontiguousarray(array)) for array in pixels)
    return [image.resize(size, how) for image in images]


def lines(text: str, width: int) -> str:
    """At most three lines of a text, its end included: prompts may be long, labels follow them."""
    most = 3 * width - 12  # lines end where words do
    if len(text) > most:
        text = f"{text[: most - 20]} … {text[-16:]}"
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))


@lru_cache
def _font(weight: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{weight}.ttf"), size)


@lru_cache(maxsize=1024)
def _extent(text: str, font: tuple[str, int]) -> tuple[int, int]:
    """Width and height of lines of text, in pixels."""
    parts = text.split("\n")
    wide = max(_font(*font).getlength(part) for part in parts)
    return -int(-wide // 1), len(parts) * font[1] + (len(parts) - 1) * _LEADING


@lru_cache(maxsize=1024)
def _wrapped(text: str, font: tuple[str, int], width: int) -> str:
    """The text in lines of at most `width` pixels."""
    for count in range(max(4, 3 * width // font[1]), 3, -1):
        wrapped = "\n".join(
            textwrap.fill(part, count, max_lines=4, placeholder=" …") for part in text.split("\n")
        )
        if _extent(wrapped, font)[0] <= width:
            return wrapped
    return wrapped


def _label(row: Row) -> str:
    """A row's label in one or two lines as short as possible, or in three if it is long."""
    for count, longest in ((1, 22), (2, 26)):
        for width in range(-(-len(row.label) // count), longest + 1):
            wrapped = textwrap.wrap(row.label, width) if width else []
            if len(wrapped) <= count:
                return "\n".join(wrapped)
    return lines(row.label, 28)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    font: tuple[str, int],
    colour: tuple[int, int, int],
    width: int,
) -> int:
    """Set a text within a width; returns where the next one may begin."""
    if not text:
        return place[1]
    text = _wrapped(text, font, width)
    draw.multiline_text(place, text, colour, _font(*font), spacing=_LEADING)
    return place[1] + _extent(text, font)[1] + 2
