"""Pictures of long and odd prompts."""

import warnings
from pathlib import Path

import pytest
import torch

from ctrl_rl.evaluation.pictures import _lines, draw_grid, draw_samples

LONG = "prompt=" + "word " * 500 + ", size=1"


@pytest.mark.parametrize("text", [LONG, "prompt=" + "w" * 500 + ", size=1", "prompt=, size=0", ""])
def test_lines_are_few_and_keep_the_label(text: str) -> None:
    lines = _lines(text, 28).split("\n")
    assert len(lines) <= 3 and all(len(line) <= 28 for line in lines)
    assert "".join(lines)[-6:] == text[-6:]


def test_a_prompt_of_500_words_leaves_room_for_pictures(tmp_path: Path) -> None:
    sample = torch.zeros(8, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [LONG, "prompt=ein Hund 🐕, size=3"]
        samples = {"prior": [sample] * 2, "policy": [sample] * 2}
        draw_samples(tmp_path / "a.png", samples=samples, conditions=names, title="run")
        draw_grid(tmp_path / "b.png", sample, title=LONG)
    assert (tmp_path / "a.png").stat().st_size > 1000 < (tmp_path / "b.png").stat().st_size
