"""Plots of samples that are not images: histograms, points in a plane, lines of signals."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ctrl_rl.evaluation.sheets import lines

# In the order of drawing.
COLOURS = {"prior": "0.65", "exact": "tab:orange", "policy": "tab:blue"}
NAMES = {
    "prior": "before: the pretrained model",
    "policy": "after: the policy",
    "exact": "exact conditional",
}
_MOST_POINTS, _MOST_LINES, _BINS = 500, 8, 50
_ACROSS, _WIDTH = 4, 8.5  # panels in a row, and their width in inches
_DPI = 100


def draw_panels(
    path: Path,
    panels: Sequence[tuple[str, Mapping[str, Tensor]]],
    *,
    title: str,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Draw a panel per condition, with every source in its own colour.

    Args:
        path: PNG to write.
        panels: titles, each with samples [N, *D] by source: "prior", "exact", "policy". Vectors are
            drawn in their first two dimensions.
        title: of the whole picture.
        figures: words about a source, after its name.
    """
    sets = [sample for _, sources in panels for sample in sources.values()]
    sources = [s for s in COLOURS if any(s in panel for _, panel in panels)]
    columns = -(-len(panels) // -(-len(panels) // _ACROSS))  # rows as even as possible
    rows = -(-len(panels) // columns)
    width = _WIDTH if columns > 2 else 2 * _WIDTH / 3
    is_plane = sets[0].ndim == 2 and sets[0].shape[1] > 1
    side = (width - 0.5) / columns
    heading = lines(title, int(11 * width))
    head = 0.35 + 0.2 * (heading.count("\n") + 1) + 0.2 * len(sources)
    height = head + rows * (side + 0.2 if is_plane else 0.6 * side + 0.3)
    figure = figure_of((width, height))
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / height), w_pad=0.08, h_pad=0.08)
    options = {"squeeze": False, "sharex": True, "sharey": is_plane}
    axes = figure.subplots(rows, columns, **options).flatten()
    reach = _limits(sets)
    for axis, (name, panel) in zip(axes, panels, strict=False):
        for source in sources:
            if source in panel:
                _draw(axis, panel[source], COLOURS[source], reach, filled=source == "prior")
        axis.set_title(lines(name, 28), fontsize=9)
        calm(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    x, y = 0.18 / width, 1 - 0.16 / height
    figure.text(x, y, heading, fontsize=11, fontweight="bold", va="top")
    y -= (0.25 + 0.2 * heading.count("\n")) / height
    for place, source in enumerate(sources):
        said = (figures or {}).get(source, "").replace("\n", "; ")
        words = f"{NAMES[source]}; {said}" if said else NAMES[source]
        level = y - 0.2 * (place + 0.5) / height
        figure.text(x, level, "\u25cf", fontsize=11, color=COLOURS[source], va="center")
        figure.text(x + 0.17 / width, level, words, fontsize=8.5, color="0.3", va="center")
    save_figure(figure, path)


def draw_plots(
    path: Path, *, rows: Mapping[str, Sequence[Tensor]], headings: Sequence[str], title: str
) -> None:
    """Draw a table of sets of samples [N, *D]; see `pictures.draw_table`."""
    size = (0.9 + 3.0 * len(headings), 1.2 + 2.2 * len(rows))
    figure = figure_of(size)
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    reach = _limits([sample for row in rows.values() for sample in row])
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for axis, sample in zip(line, row, strict=True):
            _draw(axis, sample, COLOURS["policy"], reach, filled=True)
            calm(axis)
        line[0].set_ylabel(lines(name, 28), rotation=0, ha="right", va="center")
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def figure_of(size: tuple[float, float]) -> Any:
    """A figure, in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a prompt: drawn as a box
        figure.savefig(path, dpi=_DPI)


def calm(axis: Any) -> None:
    """Thin the ticks, and keep the frame only left and below."""
    axis.tick_params(labelsize=8, length=2, color="0.7", labelcolor="0.4")
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("0.8")


def _limits(sets: Sequence[Tensor]) -> tuple[float, float]:
    """Limits of the value axes: the reach of the widest set without outliers."""
    values = [sample.flatten()[:1_000_000] for sample in sets if len(sample)]
    reach = max(float(part.float().abs().quantile(0.999)) for part in values) if values else 1.0
    return -1.1 * reach, 1.1 * reach


def _draw(
    axis: Any, sample: Tensor, colour: str, reach: tuple[float, float], *, filled: bool
) -> None:
    """One set of samples: signals [N, C, L], or vectors of one, two or more dimensions."""
    values = sample.detach().float().cpu().numpy()
    if values.ndim == 3:
        axis.set_ylim(*reach)
        for signal in values[:_MOST_LINES]:
            for place, channel in enumerate(signal):
                style = ("-", "--", ":", "-.")[place % 4]
                axis.plot(channel, color=colour, linewidth=0.9, linestyle=style, alpha=0.8)
        return
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    axis.set_xlim(*reach)
    if values.shape[1] == 1:
        axis.set_yticks([])
        if len(values):
            axis.hist(
                values[:, 0],
                bins=np.linspace(*reach, _BINS + 1),
                density=True,
                color=colour,
                histtype="stepfilled" if filled else "step",
                alpha=0.5 if filled else 1.0,
                linewidth=1.4,
            )
        return
    points = values[:_MOST_POINTS]
    axis.scatter(points[:, 0], points[:, 1], s=4, alpha=0.6, color=colour, linewidths=0)
    axis.set_ylim(*reach)
    axis.set_aspect("equal")
