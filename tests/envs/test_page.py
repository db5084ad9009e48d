"""The code of docs/environments.md, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

TEXT = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(code, made)
    assert made["observation"]["control_digit"] == 3
    assert made["batch"]["next", "done"][0, :, 0].nonzero().flatten().tolist() == [19, 39]
    with Image.open(tmp_path / "face.gif") as film:
        assert (film.size, film.n_frames) == ((256, 256), 11)
