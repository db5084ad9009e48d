"""What can be asked for: numbered without being enumerated, named, drawn at random where many."""

import itertools
import time

import pytest
import torch
from running import SMALL, own_reward, summary

from ctrl_rl import keys
from ctrl_rl.agents.parts.critics import ConditionValues, LogPartition
from ctrl_rl.agents.plan import TaskSpec
from ctrl_rl.cli.main import main
from ctrl_rl.conditions import Conditions, joint_place, label_counts
from ctrl_rl.controls import Categorical, Continuous
from ctrl_rl.errors import ConfigError

CONTROLS = {
    "shape": Categorical(("round", "flat", "long")),
    "colour": Categorical(("red", "blue")),
    "hat": Categorical(("no", "yes")),
}
SIZES = label_counts(CONTROLS)


def test_places_are_those_of_the_product() -> None:
    conditions = Conditions(CONTROLS)
    product = itertools.product(*(range(size) for size in SIZES.values()))
    expected = [dict(zip(CONTROLS, values, strict=True)) for values in product]
    assert list(conditions) == expected and conditions.size == len(conditions) == len(expected)
    assert conditions[3:7] == expected[3:7] and conditions[-1] == expected[-1]
    with pytest.raises(IndexError):
        conditions[len(expected)]


def test_a_joint_place_is_the_place_of_the_condition() -> None:
    conditions = Conditions(CONTROLS)
    columns = {name: torch.tensor([each[name] for each in conditions]) for name in CONTROLS}
    assert joint_place(SIZES, columns).tolist() == list(range(conditions.size))
    square = {name: column.reshape(3, 4) for name, column in columns.items()}
    assert joint_place(SIZES, square).tolist() == torch.arange(12).reshape(3, 4).tolist()
    assert joint_place({}, columns).tolist() == 0


def test_evaluations_go_through_their_own_prompts() -> None:
    prompts = Categorical(("ant", "bee", "cat"))
    conditions = Conditions({keys.PROMPT: prompts, "hat": CONTROLS["hat"]}, prompts=[2, 0])
    assert [conditions.name(each) for each in conditions] == [
        "prompt=cat, hat=no",
        "prompt=cat, hat=yes",
        "prompt=ant, hat=no",
        "prompt=ant, hat=yes",
    ]
    assert conditions.controls[keys.PROMPT].size == 3 and conditions.size == len(conditions) == 4


def test_without_anything_to_ask_for_there_is_one_condition() -> None:
    nothing = Conditions({})
    assert (
        list(nothing) == [{}] and nothing.name({}) == "(none)" and nothing.title({}) == "anything"
    )


def test_some_are_all_up_to_a_number_and_a_draw_beyond() -> None:
    conditions = Conditions(CONTROLS)
    assert conditions.some(12, seed=0) == list(conditions)
    few = conditions.some(5, seed=0)
    places = [list(conditions).index(each) for each in few]
    assert len(set(places)) == 5 and places == sorted(places)
    assert conditions.some(5, seed=0) == few != conditions.some(5, seed=1)
    counts = torch.zeros(12)
    for seed in range(1200):
        for each in conditions.some(3, seed):
            counts[list(conditions).index(each)] += 1
    assert (counts - 300).abs().max() < 5 * 300**0.5


def test_many_conditions_cost_nothing() -> None:
    controls = {f"control{index}": Categorical.of(1000) for index in range(12)}
    started = time.monotonic()
    conditions = Conditions(controls)
    assert conditions.size == 1000**12
    found = conditions.some(64, seed=0)
    place = sum(found[7][f"control{i}"] * 1000 ** (11 - i) for i in range(12))
    assert conditions[place] == found[7]
    assert time.monotonic() - started < 1


def test_of_infinitely_many_some_are_drawn_and_none_is_counted() -> None:
    controls = {"hat": CONTROLS["hat"], "mean": Continuous(-1.0, 3.0)}
    conditions = Conditions(controls)
    assert conditions.size == float("inf")
    drawn = conditions.some(2000, seed=0)
    assert drawn == conditions.some(2000, seed=0) != conditions.some(2000, seed=1)
    assert abs(sum(each["hat"] for each in drawn) - 1000) < 4 * 500**0.5
    means = torch.tensor([each["mean"] for each in drawn])
    assert means.min() >= -1 and means.max() <= 3 and len(set(means.tolist())) == 2000
    assert abs(means.mean() - 1) < 1e-3, "one from each part of the interval"
    assert conditions.name({"hat": 1, "mean": 0.25}) == "hat=yes, mean=0.25"
    assert conditions.name({"hat": 2, "mean": float("nan")}) == "hat=any, mean=any"
    assert conditions.title({"hat": 0, "mean": 0.125}) == "no hat, mean 0.125"
    assert conditions.title({"hat": 2, "mean": float("nan")}) == "anything"
    # With all labels and one prompt there are still infinitely many.
    prompts = Categorical(("ant", "bee", "cat"))
    asked = Conditions({keys.PROMPT: prompts, **controls}, prompts=[2, 0]).some(50, seed=0)
    prompted = [each[keys.PROMPT] for each in asked]
    assert set(prompted) == {0, 2} and prompted == sorted(prompted), "prompt by prompt"
    for through in (len, list, lambda every: every[0]):
        with pytest.raises(ConfigError, match="the control mean is a number, so there is no list"):
            through(conditions)


@pytest.mark.parametrize("make", [LogPartition, ConditionValues], ids=lambda kind: kind.__name__)
def test_what_learns_every_condition_by_itself_refuses_too_many(make: type) -> None:
    task = TaskSpec(
        shape=(2,), num_steps=3, controls={"a": Categorical.of(1000), "b": Categorical.of(1000)}
    )
    with pytest.raises(ConfigError, match=r"has 1,0\d\d,\d\d\d conditions; at most 65,536"):
        make(task)


REWARD = """
import torch

def many(sample, control):
    wanted = torch.stack([control["a"], control["b"]], 1) / 500 - 1
    return -(sample[:, :2] - wanted).square().sum(1)
"""


def test_a_task_with_a_million_conditions_trains_and_says_what_it_measured(
    tmp_path, monkeypatch, capsys
) -> None:
    words = own_reward(tmp_path, REWARD, name="many", controls="{a: 1000, b: 1000}")
    monkeypatch.syspath_prepend(tmp_path)
    more = ["agent=ctrl", "evaluation.most_conditions=5", f"run.root={tmp_path}", "run.name=run"]
    assert main(["train", *SMALL, "env=mixture2d", *words, *more]) == 0
    found = summary(tmp_path / "run")
    assert found["conditions"] == {"measured": 5, "in_all": 1_000_000}
    assert len(found["per_label"]) == 5
    assert "measured on 5 of 1,000,000 conditions, drawn at random" in capsys.readouterr().err
