"""The examples of docs/integrations.md: they learn, and the page shows what is in their files."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ctrl_rl
from ctrl_rl.evaluation.evaluate import EvaluationPlan

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "integrations.md").read_text()
EXAMPLES = ["sb3_ppo", "ppo_in_one_file", "torchrl_ppo"]
PLAN = EvaluationPlan(prior_samples=1024, policy_samples=512, exact_samples=0)


@pytest.fixture
def example(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "sb3_ppo":
        pytest.importorskip("stable_baselines3")
    monkeypatch.syspath_prepend(DOCS / "integrations")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module(request.param)
    torch.set_num_threads(threads)


def act_of(example: Any, steps: int) -> Any:
    trained = example.train(steps)
    if example.__name__ == "sb3_ppo":
        return example.actions_of(trained)
    return trained.act


@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
def test_a_tenth_of_the_steps_takes_more_than_half_of_the_priors_gap(example: Any) -> None:
    found = ctrl_rl.evaluate_policy(example.TASK, act_of(example, 40_000), plan=PLAN).summary
    assert found["prior"]["gap_nats"] > 10
    assert found["gap_nats_ci"][1] < found["prior"]["gap_nats"] - 5
    assert found["gap_nats"] < found["gap_nats_certified"] < found["prior"]["gap_nats"]


@pytest.mark.science
@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
def test_the_whole_run_ends_near_what_the_page_says(example: Any) -> None:
    assert example.main()["gap_nats"] < 1.3  # the table has 0.8 to 1.0


def test_the_page_runs_and_shows_the_files() -> None:
    made: dict[str, Any] = {}
    blocks = re.findall(r"(?:\[`(\w+\.py)`\]\([^)]*\)[^\n]*\n)?\n```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    for file, code in blocks:
        if file:
            assert code in (DOCS / "integrations" / file).read_text()
        else:
            exec(code, made)
    assert made["summary"]["gap_nats"] < made["summary"]["prior"]["gap_nats"] - 3


def test_links_of_the_page_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (DOCS / target).is_file(), target


def test_the_table_is_of_every_example() -> None:
    table = PAGE.partition("<!-- gaps -->")[2].partition("<!-- /gaps -->")[0]
    assert all(f"`{name}.py`" in table for name in EXAMPLES)
