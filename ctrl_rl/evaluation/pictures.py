"""samples.png: prior, policy and exact conditional side by side, one row per label."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

_COLUMNS = 8  # images per cell
_TITLES = {"prior": "prior", "policy": "policy", "exact": "exact conditional"}


def draw_samples(
    path: Path,
    *,
    samples: Mapping[str, Sequence[Tensor]],
    conditions: Sequence[str],
    title: str,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Draw samples of every condition (rows) for every source (columns).

    Args:
        path: PNG to write.
        samples: by source, one tensor [N, *D] per condition.
        conditions: names of the rows.
        title: of the whole picture.
        figures: a line under a source's title, such as its accuracy.
    """
    headings = []
    for source in samples:
        heading, line = _TITLES.get(source, source), (figures or {}).get(source)
        headings.append(f"{heading}\n{line}" if line else heading)
    rows = {
        name: [_from_row(parts[row], row) for parts in samples.values()]
        for row, name in enumerate(conditions)
    }
    draw_table(path, rows=rows, headings=headings, title=title, count=_COLUMNS)


def draw_table(
    path: Path,
    *,
    rows: Mapping[str, Sequence[Tensor]],
    headings: Sequence[str],
    title: str,
    count: int,
) -> None:
    """Draw a table of sets of samples.

    Args:
        path: PNG to write.
        rows: by name of the row, one tensor [N, *D] per column: images [C, H, W] in [-1, 1] are
            drawn as pictures, vectors as histograms (one dimension) or scatter plots (first two).
        headings: of the columns.
        title: of the whole picture.
        count: images per set; of vectors, all are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = [sample for row in rows.values() for sample in row]
    is_image = sets[0].ndim == 4
    width, height = (0.45 * count, 0.55) if is_image else (3.0, 2.2)
    figure = Figure(
        figsize=(0.9 + width * len(headings), 1.2 + height * len(rows)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    limits = None if is_image else _limits(sets)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for axis, sample in zip(line, row, strict=True):
            if is_image:
                _show(axis, _tile(sample[:count], count))
            else:
                _draw_points(axis, sample, limits)
        line[0].set_ylabel(_lines(name, 28), rotation=0, ha="right", va="center")
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_grid(path: Path, sample: Tensor, *, title: str, columns: int = 8) -> None:
    """Draw one set of samples: images in a grid, vectors as a plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    is_image = sample.ndim == 4
    rows = -(-len(sample) // columns)
    size = (0.7 * columns, 0.7 * rows + 0.6) if is_image else (5, 4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    if is_image:
        _show(axis, _tile(sample, columns))
    else:
        _draw_points(axis, sample, _limits([sample]))
    axis.set_title(_lines(title, 80), fontsize=10)
    _save(figure, path)


def _lines(text: str, width: int) -> str:
    """At most three lines of a text, its end with them: prompts may be long, labels follow them."""
    most = 3 * width - 12  # lines end where words do
    if len(text) > most:
        text = f"{text[: most - 20]} … {text[-16:]}"
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …"))


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a prompt: drawn as a box
        figure.savefig(path, dpi=110)


def _from_row(sample: Tensor, row: int) -> Tensor:
    """Start every row at other samples where there are enough: the rows of a prior share theirs."""
    return sample[row * _COLUMNS :] if len(sample) >= (row + 1) * _COLUMNS else sample


def _show(axis: Any, picture: np.ndarray) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _tile(sample: Tensor, columns: int) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as one picture [rows H, columns W, C] in [0, 1]."""
    image = (sample.float().cpu().clamp(-1, 1).numpy() + 1) / 2
    n, channels, height, width = image.shape
    rows = max(1, -(-n // columns))
    # White where there is no image, and a line of one pixel between two.
    canvas = np.ones((rows, columns, channels, height + 1, width + 1), dtype=np.float32)
    for index in range(n):
        canvas[index // columns, index % columns, :, :height, :width] = image[index]
    picture = canvas.transpose(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * (height + 1), columns * (width + 1), channels)
    return picture[..., 0] if channels == 1 else picture[..., :3]


def _limits(sets: Sequence[Tensor]) -> tuple[float, float]:
    """Of the axes of vectors: the reach of the widest set but for outliers."""
    values = [sample.flatten() for sample in sets if len(sample)]
    reach = max(float(part.abs().quantile(0.999)) for part in values) if values else 1.0
    return -1.1 * reach, 1.1 * reach


def _draw_points(axis: Any, sample: Tensor, limits: tuple[float, float] | None) -> None:
    assert limits is not None, "vectors have limits, images have none"
    points = sample.float().cpu().numpy()
    axis.set_xlim(*limits)
    if points.shape[1] == 1:
        axis.hist(points[:, 0], bins=60, range=limits, density=True, color="tab:blue")
        axis.set_yticks([])
    else:
        axis.scatter(points[:1000, 0], points[:1000, 1], s=3, alpha=0.5)
        axis.set_ylim(*limits)
        axis.set_aspect("equal")
