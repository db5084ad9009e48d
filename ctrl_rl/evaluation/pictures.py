"""samples.png: the pretrained model, the policy and the exact conditional side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ctrl_rl.evaluation.points import draw_panels, draw_plots
from ctrl_rl.evaluation.sheets import Headings, Row, sheet
from ctrl_rl.evaluation.side_by_side import Comparison, Strip

_COLUMNS, _EXACT_COLUMNS = 8, 5
_MOST_BANDS = 8  # of eight columns each, in a picture of drawn samples
_SAME = "In every column the noise is the same, before and after."


def draw_samples(
    path: Path,
    *,
    compared: Sequence[Comparison],
    samples: Mapping[str, Sequence[Tensor]],
    title: str,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Draw an evaluation's comparisons: images as a sheet, all else as plots.

    A sheet shows the pretrained model's images in the first row and, below, the policy's from the
    same noise, one row per condition, beside the exact conditional's.

    Args:
        path: PNG to write.
        compared: the first conditions of the evaluation, from the same noise.
        samples: all samples of the evaluation, by "prior", "policy" and perhaps "exact", one tensor
            [N, *D] per condition.
        title: of the whole picture.
        figures: a line about a source, such as its accuracy.
    """
    figures = figures or {}
    titles = [strip.title for each in compared for strip in each.after]
    conditions = len(samples["policy"])
    if conditions > len(titles):
        title = f"{title}; the first {len(titles)} of {conditions} conditions"
    if not _are_images(compared[0].before.samples):
        sets = [{s: parts[i] for s, parts in samples.items()} for i in range(len(titles))]
        draw_panels(path, list(zip(titles, sets, strict=True)), title=title, figures=figures)
        return
    exact = list(samples.get("exact", []))
    columns = [_COLUMNS, _EXACT_COLUMNS] if exact else [_COLUMNS]
    names = ["after: the policy", "exact conditional"][: len(columns)]
    notes = [figures.get(source, "") for source in ("policy", "exact")][: len(columns)]
    beside = [""] if exact else []
    items: list[Row | Headings] = []
    if len(compared) == 1:
        first = compared[0].before
        items.append(Headings([first.title, *beside], [figures.get("prior", ""), *beside]))
        items.append(Row("", [first.samples, *beside]))
    items.append(Headings(names, notes))
    place = 0
    for index, each in enumerate(compared):
        if len(compared) > 1:  # each has a prompt and its own row before
            items.append(Row(each.before.title, [each.before.samples, *beside], apart=index > 0))
        for strip in each.after:
            accepted = [exact[place] if len(exact[place]) else "none accepted"] if exact else []
            items.append(Row(strip.title, [strip.samples, *accepted]))
            place += 1
    paired = all(strip.paired for each in compared for strip in each.after)
    sheet(items, columns, title=title, note=_SAME if paired else "").save(path)


def draw_strips(path: Path, strips: Sequence[Strip], *, title: str) -> None:
    """Draw strips from the same noise, the pretrained model's first.

    Args:
        path: PNG to write.
        strips: all with the same number of samples. The first 64 images are drawn in bands of eight
            columns; vectors and signals get a panel per strip, over the first one's if there are
            several.
        title: of the whole picture.
    """
    n = len(strips[0].samples)
    if not _are_images(strips[0].samples):
        if len(strips) == 1:
            draw_plots(path, rows={"": [strips[0].samples]}, headings=[""], title=title)
            return
        panels = [
            (strip.title, {"prior": strips[0].samples, "policy": strip.samples})
            for strip in strips[1:]
        ]
        draw_panels(path, panels, title=title)
        return
    shown = min(n, _MOST_BANDS * _COLUMNS)
    if n > shown:
        title = f"{title}; the first {shown} of {n} samples"
    items = [
        Row(strip.title, [strip.samples[start : start + _COLUMNS]], apart=start > 0 and i == 0)
        for start in range(0, shown, _COLUMNS)
        for i, strip in enumerate(strips)
    ]
    paired = len(strips) > 1 and all(strip.paired for strip in strips)
    note = "In every column the noise is the same." if paired else ""
    sheet(items, [min(n, _COLUMNS)], title=title, note=note).save(path)


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
            drawn as pictures, all else as in `draw_panels`.
        headings: of the columns.
        title: of the whole picture.
        count: images per set; anything else is drawn whole.
    """
    if not _are_images(next(iter(rows.values()))[0]):
        draw_plots(path, rows=rows, headings=headings, title=title)
        return
    items: list[Row | Headings] = [Headings(headings, [""] * len(headings))]
    items += [Row(name, sets) for name, sets in rows.items()]
    sheet(items, [count] * len(headings), title=title).save(path)


def _are_images(sample: Tensor) -> bool:
    return sample.ndim == 4
