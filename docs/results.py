"""Write a table of results from the summaries of runs: `make results` after `make demo`.

    python docs/results.py README.md docs/demo runs/demo

replaces what stands between `<!-- results -->` and `<!-- /results -->` in the file, and copies the
first run's picture to docs/demo.png and its film, where it has one, to docs/demo.gif.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_COLUMNS = {
    "gap": "gap_nats",
    "95 % interval": "gap_nats_ci",
    "certified ≤": "gap_nats_certified",
    "KL": "kl_nats",
    "reward": "reward",
    "accuracy": "accuracy",
    "held-out accuracy": "heldout_accuracy",
    "diversity": "diversity",
}


def main(arguments: list[str]) -> None:
    """Fill the file's table from the run folders."""
    document, pictures = Path(arguments[0]), Path(arguments[1])
    folders = [Path(folder) for folder in arguments[2:]]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    fill(document, "results", _table(folders, summaries))
    for name, suffix in {"samples.png": ".png", "denoising.gif": ".gif"}.items():
        if (folders[0] / name).is_file():
            shutil.copyfile(folders[0] / name, pictures.with_suffix(suffix))


def fill(document: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = document.read_text().split(start, 1)
    document.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}")


def _table(folders: list[Path], summaries: list[dict[str, Any]]) -> str:
    """Prior, policy and exact conditional of every run: each chain has its own."""
    lines = ["| | " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * len(_COLUMNS)]
    for folder, summary in zip(folders, summaries, strict=True):
        config = OmegaConf.load(folder / "config.yaml")
        run = f"`{folder.name}`, K = {config.kernel.num_steps}"
        training = f"{summary['steps']:,} updates, {summary['wall_s'] / 60:.1f} min"
        lines.append(_row(f"{run}: prior", summary["prior"]))
        lines.append(_row(f"**{summary['agent']}**, {training}", summary))
        lines.append(_row("exact conditional", summary["exact"]))
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any]) -> str:
    cells = [_cell(figures.get(key)) for key in _COLUMNS.values()]
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(value: float | list[float] | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"[{value[0]:.2f}, {value[1]:.2f}]"
    return f"{value:.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
