"""An evaluation in a few lines of text, or as a table and a picture for notebooks."""

import base64
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

COLUMNS = {
    "reward": "reward",
    "KL": "kl_nats",
    "gap": "gap_nats",
    "certified": "gap_nats_certified",
    "accuracy": "accuracy",
    "held-out": "heldout_accuracy",
    "diversity": "diversity",
}
_STYLE = "text-align: right; padding: 2px 8px"


def cell(value: float | None) -> str:
    """A figure in a table."""
    return "–" if value is None else f"{value:.3f}"


def in_lines(summary: Mapping[str, Any]) -> list[str]:
    """The most important figures, in nats and shares."""
    certified, accuracy = summary["gap_nats_certified"], summary["accuracy"]
    sure = "not certified" if certified is None else f"certified <= {certified:.3f}"
    before = summary["prior"]["gap_nats"]
    lines = [f"{_gap(summary)} nats, {sure}; the prior's {before:.3f}"]
    if accuracy is not None:
        heldout = summary["heldout_accuracy"]
        judged = "" if heldout is None else f", held-out {heldout:.3f}"
        lines.append(f"accuracy {accuracy:.3f}{judged}")
    return lines


def as_html(title: str, summary: Mapping[str, Any], picture: bytes | None) -> str:
    """A heading, the table of prior, policy and exact conditional, and a picture.

    Args:
        title: plain text.
        summary: as in summary.json; empty for no table.
        picture: a PNG, or None.
    """
    parts = [f"<p><b>{escape(title)}</b></p>"]
    if summary:
        rows = {"prior": summary["prior"], "policy": summary, "exact": summary["exact"]}
        head = "".join(f'<th style="{_STYLE}">{escape(each)}</th>' for each in ("", *COLUMNS))
        body = "".join(
            _row([source, *(cell(row.get(name)) for name in COLUMNS.values())])
            for source, row in rows.items()
            if row is not None
        )
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
        parts.append(f"<p>{escape(_gap(summary))}; in nats</p>")
    if picture is not None:
        content = base64.b64encode(picture).decode()
        parts.append(f'<img style="max-width: 100%" src="data:image/png;base64,{content}">')
    return f"<div>{''.join(parts)}</div>"


def as_png(draw: Callable[[Path], None]) -> bytes:
    """The picture that a function writes to a path."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return path.read_bytes()


def _gap(summary: Mapping[str, Any]) -> str:
    low, high = summary["gap_nats_ci"]
    return f"gap {summary['gap_nats']:.3f} [{low:.3f}, {high:.3f}]"


def _row(cells: list[str]) -> str:
    return "<tr>" + "".join(f'<td style="{_STYLE}">{each}</td>' for each in cells) + "</tr>"
