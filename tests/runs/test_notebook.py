"""docs/notebook.ipynb and docs/python.md, run as they stand; how runs and evaluations print."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from running import SMALL

import ctrl_rl
from ctrl_rl import LoadedRun, load_run
from ctrl_rl.evaluation.evaluate import Evaluation
from ctrl_rl.evaluation.side_by_side import Strip

DOCS = Path(__file__).parents[2] / "docs"


def show(value: Any) -> dict[str, Any]:
    """What a notebook asks of the last value of a cell."""
    methods = ("_repr_html_", "_repr_png_", "__repr__")
    return {name: getattr(value, name)() for name in methods if hasattr(value, name)}


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; its last value, if it ends with one."""
    body = ast.parse(code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {"__name__": "__main__"}
    values = [run_cell("".join(cell["source"]), names) for cell in cells]
    shown = [show(value) for value in values if value is not None]
    assert capsys.readouterr().err == "", "quiet"
    kinds = [type(value) for value in values if value is not None]
    assert kinds == [LoadedRun, Strip, Strip, LoadedRun, Strip, Strip, dict, Evaluation]
    assert all(len(each["__repr__"].splitlines()) <= 4 for each in shown)
    run = names["run"]
    assert run.summary["gap_nats_ci"][1] < 0.3 * run.summary["prior"]["gap_nats"]
    (level,) = [value for value in values if isinstance(value, dict)]
    assert level[-0.6] + 0.1 < level[-0.4] + 0.05 < level[-0.2]


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.S):
        exec(code, names)
    assert names["samples"].shape == (64, 2) and names["right"].shape == (64, 2)
    assert names["episodes"].batch_size == (32, 10)
    folders = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert folders == ["circle", "mixture2d-ctrl-s0", "places"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    overrides = [word for word in SMALL if not word.startswith("env=")]
    root = tmp_path_factory.mktemp("runs")
    return ctrl_rl.train("mixture1d", name="<mix>", root=root, overrides=overrides, quiet=True)


def test_a_run_prints_in_four_lines(run: LoadedRun) -> None:
    first, controls, gap, accuracy = repr(run).splitlines()
    assert first.endswith("<mix>: ctrl on mixture1d, update 12") and "group (0 to 1)" in controls
    found = run.summary
    low, high = found["gap_nats_ci"]
    assert f"gap {found['gap_nats']:.3f} [{low:.3f}, {high:.3f}] nats" in gap
    assert f"certified <= {found['gap_nats_certified']:.3f}" in gap
    assert f"accuracy {found['accuracy']:.3f}" in accuracy
    evaluation = run.evaluate()
    assert repr(evaluation).splitlines() == ["evaluation of 2 conditions", gap, accuracy]
    before = load_run(run.run.path, checkpoint=5)  # which nobody has evaluated
    assert repr(before).splitlines()[-1] == "  not evaluated at this update"
    assert "<table>" not in before._repr_html_() and "<img" not in before._repr_html_()
    law = Evaluation(
        {**evaluation.summary, "gap_nats_certified": None, "accuracy": None}, {}, [], []
    )
    assert repr(law).count("\n") == 1 and "not certified" in repr(law)


def picture(html: str) -> Image.Image:
    (content,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_a_notebook_shows_a_table_and_the_picture(run: LoadedRun) -> None:
    html = run._repr_html_()
    assert "&lt;mix&gt;: ctrl" in html and "<mix>" not in html
    with Image.open(run.run.path / "samples.png") as stored:
        assert picture(html).size == stored.size
    found = run.summary
    for row in (found["prior"], found, found["exact"]):
        assert f">{row['reward']:.3f}<" in html and f">{row['kl_nats']:.3f}<" in html
    evaluation = run.evaluate()
    assert picture(evaluation._repr_html_()).width > 300
    assert len(evaluation._repr_html_()) < 200_000
    none = {**evaluation.samples, "exact": [torch.zeros(0, 1), torch.zeros(0, 1)]}
    empty = Evaluation(evaluation.summary, none, evaluation.conditions, evaluation.asked)
    assert picture(empty._repr_html_()).height < picture(evaluation._repr_html_()).height


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (2,), (1,), (2, 16)])
def test_a_strip_is_a_picture(shape: tuple[int, ...]) -> None:
    samples = torch.randn(9, *shape, generator=torch.Generator().manual_seed(0))
    strip = Strip("digit 3", samples[:, None].expand(-1, 4, *shape), samples)
    assert repr(strip) == f"9 samples of shape {shape}: digit 3"
    assert Image.open(io.BytesIO(strip._repr_png_())).width > 100


def test_importing_is_light_and_names_are_listed() -> None:
    code = """
import sys, ctrl_rl
assert not {"torch", "omegaconf", "hydra", "numpy"} & set(sys.modules)
assert {"train", "load_run", "make_env"} <= set(dir(ctrl_rl))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
