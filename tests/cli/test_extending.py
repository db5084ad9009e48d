"""The plug-ins of docs/extending.md, run as they stand there."""

import re
from pathlib import Path

import pytest
from running import SMALL, metrics, summary

from ctrl_rl.cli.main import main

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
CHANGES = [word for word in SMALL if not word.startswith("env=")]


def write_section(title: str, folder: Path) -> list[str]:
    """Write the files that a section shows; returns the words of its command."""
    section = re.split(r"^## ", TEXT, flags=re.M)
    (body,) = [part for part in section if part.startswith(title)]
    for code in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", body, re.S):
        file = folder / code[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code[1])
    command = re.search(r"```bash\n.*?ctrl-rl (.*?)```", body, re.S)
    assert command is not None
    return command[1].replace("my_configs", str(folder / "my_configs")).replace("'", "").split()


TITLES = [
    "A reward in three lines",
    "A number as the control",
    "An agent\n",
    "An agent with a quantity of its own",
    "A prior",
]


@pytest.mark.parametrize("title", TITLES)
def test_the_example_runs_as_it_stands(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = write_section(title, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*words, *CHANGES, f"run.root={tmp_path}", "run.name=run"]) == 0
    assert len(metrics(tmp_path / "run")) == 12
    assert summary(tmp_path / "run")["gap_nats"] > 0


def test_the_agent_of_the_page_learns_and_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = write_section("An agent\n", tmp_path)
    lines = [line for line in (tmp_path / "my_agents.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 14
    monkeypatch.syspath_prepend(tmp_path)
    more = ["trainer.updates=60", "trainer.batch_size=128", "evaluation.prior_samples=2048"]
    run = ["evaluation.policy_samples=512", f"run.root={tmp_path}", "run.name=run"]
    assert main([*words, *CHANGES, *more, *run]) == 0
    found = summary(tmp_path / "run")
    assert found["gap_nats_ci"][1] < found["prior"]["gap_nats"]
