"""samples.png: prior, policy and exact conditional side by side, one row per label."""

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
        samples: by source, one tensor [N, *D] per condition: images [C, H, W] in [-1, 1] are drawn
            as pictures, vectors as histograms (one dimension) or scatter plots (first two).
        conditions: names of the rows.
        title: of the whole picture.
        figures: a line under a source's title, such as its accuracy.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = list(samples)
    is_image = samples[sources[0]][0].ndim == 4
    width, height = (3.6, 0.55) if is_image else (3.0, 2.2)
    figure = Figure(
        figsize=(0.9 + width * len(sources), 1.2 + height * len(conditions)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(conditions), len(sources), squeeze=False)
    draw = _draw_images if is_image else _draw_points
    limits = None if is_image else _limits(samples)
    for column, source in enumerate(sources):
        for row, name in enumerate(conditions):
            axis = axes[row][column]
            draw(axis, _from_row(samples[source][row], row), limits)
            if column == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center")
        heading = _TITLES.get(source, source)
        line = (figures or {}).get(source)
        axes[0][column].set_title(f"{heading}\n{line}" if line else heading, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


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
        _draw_points(axis, sample, _limits({"samples": [sample]}))
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _from_row(sample: Tensor, row: int) -> Tensor:
    """Start every row at other samples where there are enough: the rows of a prior share theirs."""
    return sample[row * _COLUMNS :] if len(sample) >= (row + 1) * _COLUMNS else sample


def _draw_images(axis: Any, sample: Tensor, limits: Any) -> None:
    del limits
    _show(axis, _tile(sample[:_COLUMNS], _COLUMNS))


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


def _limits(samples: Mapping[str, Sequence[Tensor]]) -> tuple[float, float]:
    values = [part.flatten() for parts in samples.values() for part in parts if len(part)]
    reach = max(float(part.abs().quantile(0.999)) for part in values) if values else 1.0
    return -1.1 * reach, 1.1 * reach


def _draw_points(axis: Any, sample: Tensor, limits: tuple[float, float] | None) -> None:
    points = sample.float().cpu().numpy()
    assert limits is not None, "points have limits, images have none"
    axis.set_xlim(*limits)
    if points.shape[1] == 1:
        axis.hist(points[:, 0], bins=60, range=limits, density=True, color="tab:blue")
        axis.set_yticks([])
    else:
        axis.scatter(points[:1000, 0], points[:1000, 1], s=3, alpha=0.5)
        axis.set_ylim(*limits)
        axis.set_aspect("equal")
