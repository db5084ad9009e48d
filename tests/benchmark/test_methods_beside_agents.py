"""Methods that need no training in the same grid, table and pictures as agents."""

import csv

from running import SMALL, summary

from ctrl_rl import load_run
from ctrl_rl.benchmark.grid import build_grid
from ctrl_rl.cli.main import main
from ctrl_rl.runs.compose import compose

OVERRIDES = [*(word for word in SMALL if word != "env=gaussian"), "kernel.num_steps=3"]
WORDS = ["agents=[ctrl]", "methods=[rejection,prior]", "tasks=[mixture2d]", "seeds=[1,2]"]


def test_methods_stand_beside_agents(tmp_path, capsys) -> None:
    words = [*WORDS, "denoiser_calls=null", f"overrides={OVERRIDES}", f"root={tmp_path / 'runs'}"]
    assert main(["benchmark", *words, f"out={tmp_path / 'report'}"]) == 0
    with (tmp_path / "report" / "results.csv").open() as file:
        rows = {f"{row['agent']}-s{row['seed']}": row for row in csv.DictReader(file)}
    assert list(rows) == ["ctrl-s1", "ctrl-s2", "rejection-s1", "prior-s1"]
    for name, row in rows.items():
        folder = tmp_path / "runs" / "mixture2d" / name
        assert row["state"] == "finished"
        assert float(row["gap_nats"]) == summary(folder)["gap_nats"]
        assert load_run(folder).sample(control=1, n=3).shape == (3, 2)
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.index("`rejection`") < report.index("`prior`"), "ranked by the gap"
    for name in ("gap", "pareto", "samples"):
        assert (tmp_path / "report" / f"{name}-mixture2d.png").is_file()
    assert "4 cells, 4 new" in capsys.readouterr().err
    assert main(["benchmark", *words, f"out={tmp_path / 'report'}"]) == 0
    assert "4 cells, 4 finished" in capsys.readouterr().err


def test_methods_alone_need_no_agent(tmp_path) -> None:
    alone = [
        "agents=[]",
        "methods=[rejection,prior]",
        "tasks=[mixture2d]",
        f"overrides={OVERRIDES}",
    ]
    words = ["benchmark", *alone, f"root={tmp_path / 'runs'}", f"out={tmp_path / 'report'}"]
    assert main(words) == 0
    pictures = {file.name for file in (tmp_path / "report").glob("*.png")}
    assert pictures == {"pareto-mixture2d.png", "samples-mixture2d.png"}, "no curves"


def test_what_is_refused(tmp_path, capsys) -> None:
    for word, told in {
        "methods=[rejectoin]": "methods names the unknown method 'rejectoin'",
        "methods=[prior,prior]": "methods has prior twice",
        "overrides=['method=prior']": "use agents, methods, tasks",
        "agents=[]": "agents=[] leaves nothing to do",
    }.items():
        assert main(["benchmark", word, f"root={tmp_path}"]) == 2
        assert told in capsys.readouterr().err, word
    made = tmp_path / "method"
    made.mkdir()
    (made / "ctrl.yaml").write_text("_target_: ctrl_rl.methods.prior\n_partial_: true\n")
    words = ["benchmark", f"--config-dir={tmp_path}", "agents=[ctrl]", "methods=[ctrl]"]
    assert main(words) == 2
    assert "'ctrl' is an agent and a method" in capsys.readouterr().err


def test_the_cells_of_methods_are_composed_as_evaluate_does() -> None:
    grid = build_grid(compose("benchmark", [*WORDS, "overrides=['kernel.num_steps=5']"]))
    found = {cell.name: cell.config for cell in grid.cells}
    assert found["mixture2d/rejection-s1"].choices.method == "rejection"
    assert found["mixture2d/rejection-s1"].kernel.num_steps == 5
    assert "method" not in found["mixture2d/ctrl-s1"]
