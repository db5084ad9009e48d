"""The wheel holds everything and works from an empty folder."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import ctrl_rl.agents.ctrl, ctrl_rl.assets, ctrl_rl.envs.latent
from ctrl_rl.cli.main import main
for module in (ctrl_rl, ctrl_rl.agents.ctrl, ctrl_rl.envs.latent):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert ctrl_rl.assets.resolve("package://digits/prior/probe.json").is_file()
sys.exit(main(["list"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "project"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("ctrl_rl", "envs", "agents", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    probe = source / "ctrl_rl" / "assets" / "digits" / "prior" / "probe.json"  # a folder of weights
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text("{}")
    words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist")]
    command = [sys.executable, *words, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


def test_wheel_holds_code_configs_and_assets(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("ctrl_rl", "envs", "agents", "configs"):
        prefix = "" if folder == "ctrl_rl" else "ctrl_rl/"
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".safetensors"):
                assert f"{prefix}{file.relative_to(ROOT)}" in inside
    assert not [name for name in inside if name.startswith(("envs/", "agents/", "configs/"))]
    assert not [name for name in inside if name.startswith("tests")]


def test_wheel_works_from_an_empty_folder(wheel, tmp_path):
    unpacked, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(unpacked)
    command = [sys.executable, "-I", "-c", CODE, str(unpacked)]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gaussian" in done.stdout


def test_wheel_holds_the_faces_and_is_small(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in ("sheet.webp", "labels.csv", "faces.json", "README.md"):
        assert f"ctrl_rl/assets/faces/data/{name}" in inside
    assert wheel.stat().st_size < 8e6
