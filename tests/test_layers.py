"""The import graph is what pyproject.toml says, and the light modules are light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = "('torch', 'tensordict', 'torchrl', 'diffusers', 'matplotlib', 'sklearn')"


def test_imports_go_downward_only(monkeypatch, capsys):
    lint = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    code = lint.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "statement",
    [
        "import ctrl_rl",
        "import ctrl_rl.envs.registration",
        "from ctrl_rl.cli.main import main; main(['train', 'agent=ctlr'])",
        "from ctrl_rl.cli.main import main; main(['train', 'trainer.updtes=3'])",
        "from ctrl_rl.cli.main import main; main(['list'])",
    ],
)
def test_light_imports(statement):
    code = f"{statement}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
