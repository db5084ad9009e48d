"""asked.png: what samples show of a numeric control, over the value asked for."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_rl.evaluation.points import COLOURS, NAMES, calm, figure_of, save_figure

_PANEL = (5.5, 4.2)  # inches


def draw_asked(
    path: Path, rows: Sequence[tuple[Mapping[str, float], Mapping[str, Any]]], *, title: str
) -> bool:
    """Draw a panel per numeric control: mean and spread of what samples show of it.

    Args:
        path: PNG to write.
        rows: conditions, and the figures of each as in `per_label` of summary.json.
        title: of the whole picture.

    Returns:
        Whether there was anything to draw.
    """
    names = sorted({name for _, row in rows for name in row.get("shown", {})})
    if not names:
        return False
    figure = figure_of((_PANEL[0] * len(names), _PANEL[1]))
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        known = [(c[name], row) for c, row in rows if not math.isnan(c.get(name, math.nan))]
        known.sort(key=lambda pair: pair[0])
        asked = np.array([value for value, _ in known])
        axis.plot(asked, asked, color="0.3", linewidth=1, linestyle=":", label="as asked for")
        for source in COLOURS:
            figures = [row if source == "policy" else row.get(source) for _, row in known]
            shown = [(each or {}).get("shown", {}).get(name) for each in figures]
            places = [index for index, each in enumerate(shown) if each is not None]
            if not places:
                continue
            mean, std = (np.array([shown[i][key] for i in places]) for key in ("mean", "std"))
            x, colour = asked[places], COLOURS[source]
            alone = all(len(condition) == 1 for condition, _ in rows)
            if alone:  # else points of other labels stand between
                axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
            style = "-" if alone else ""
            axis.plot(x, mean, style, color=colour, marker="o", markersize=4, label=NAMES[source])
        axis.set_xlabel(f"{name.replace('_', ' ')} asked for", fontsize=9)
        axis.set_ylabel(f"{name.replace('_', ' ')} of samples: mean, ± std", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
        calm(axis)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    save_figure(figure, path)
    return True
