"""What can be asked for: labels and numbers, as people write them, and what is refused."""

import math
import random

import numpy as np
import pytest
import torch

from ctrl_rl.controls import Categorical, Continuous, Control, as_control, described
from ctrl_rl.errors import ConfigError

HAIR, MEAN = Categorical(("black", "red", "grey")), Continuous(-1.0, 0.7)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("control", "given", "read"),
    [
        (HAIR, "red", 1),
        (HAIR, "2", 2),
        (HAIR, "any", 3),
        (HAIR, ["grey", 0, "any"], [2, 0, 3]),
        (HAIR, np.array(["red", "black"]), [1, 0]),
        (HAIR, torch.tensor([0, 3]), [0, 3]),
        (Categorical(("no", "any")), "any", 1),
        (MEAN, 0.25, 0.25),
        (MEAN, 0, 0.0),
        (MEAN, "0.5", 0.5),
        (MEAN, ["-1", 0.25], [-1.0, 0.25]),
        (MEAN, np.array([0.5, 0.25]), [0.5, 0.25]),
        (MEAN, np.array(["0.5", "0.25"]), [0.5, 0.25]),
        (MEAN, torch.tensor([0.5], dtype=torch.float64), [0.5]),
    ],
)
def test_values_are_read_as_people_write_them(control: Control, given: object, read: object):
    values = control.read("c", given, CPU)
    assert values.tolist() == read and values.dtype == control.dtype


@pytest.mark.parametrize("control", [HAIR, MEAN])
def test_what_asks_for_nothing(control: Control):
    for given in ("any", control.null):
        assert control.is_null(control.read("c", given, CPU))
    drawn = torch.tensor(control.random_values(50, random.Random(0)))
    assert not control.is_null(drawn).any()
    assert torch.equal(control.read("c", drawn, CPU), drawn), "a value in range"
    assert control.shown(control.null) == "any"


@pytest.mark.parametrize("end", [-1.0, 0.7, 0.1 + 0.2])
def test_the_ends_of_an_interval_belong_to_it(end: float):
    """Whichever way 0.7 is rounded to float32."""
    for control in (Continuous(-2.0, end), Continuous(end, 2.0)):
        for given in (end, str(end), torch.tensor(end)):
            assert control.read("c", given, CPU) == torch.tensor(end)


@pytest.mark.parametrize(
    ("control", "given", "told"),
    [
        (HAIR, "blak", "unknown label 'blak' of control c; did you mean 'black'"),
        (HAIR, 4, r"use whole labels 0 to 2 \(black, red, grey\), or 3"),
        (HAIR, 0.5, "use whole labels 0 to 2"),
        (MEAN, 0.71, "c=0.709.* is out of range; use numbers from -1 to 0.7, or any"),
        (MEAN, [0.0, -1.1], "out of range"),
        (MEAN, math.inf, "out of range"),
        (MEAN, "many", "'many' is no number; use one from -1 to 0.7, or any"),
        (MEAN, None, "None is no number"),
        (MEAN, [0.5, [0.5]], "is nested"),
    ],
)
def test_values_that_do_not_exist_are_refused(control: Control, given: object, told: str):
    with pytest.raises(ConfigError, match=told):
        control.read("c", given, CPU)


@pytest.mark.parametrize(
    ("given", "control"),
    [
        (3, Categorical(("0", "1", "2"))),
        (["no", "yes"], Categorical(("no", "yes"))),
        ([False, True], Categorical(("no", "yes"))),  # of yaml without quotes
        ({"low": -1, "high": 0.7}, MEAN),
        (HAIR, HAIR),
    ],
)
def test_controls_are_what_configs_say(given: object, control: Control):
    assert as_control(given, "controls.c") == control
    assert as_control(control.as_json(), "controls.c") == control


@pytest.mark.parametrize(
    "given",
    [0, -1, True, 2.5, "yes", [], {"low": 1}, None, [1, 2], [True, False], {"low": "a", "high": 1}],
)
def test_what_is_no_control_is_refused(given: object):
    with pytest.raises(ConfigError, match="controls.c"):
        as_control(given, "controls.c")


@pytest.mark.parametrize("ends", [(1, 1), (2, 1), (-math.inf, 1), (math.nan, 1)])
def test_what_is_no_interval_is_refused(ends: tuple[float, float]):
    with pytest.raises(ConfigError, match="give two numbers, low < high"):
        Continuous(*ends)


def test_controls_in_words():
    told = described({"hair": HAIR, "digit": Categorical.of(10), "mean": MEAN})
    assert told == "hair (black, red, grey), digit (0 to 9), mean (a number from -1 to 0.7)"
    assert HAIR.title("hair_colour", 1) == "hair colour red"
    assert Categorical(("no", "yes")).title("hat", 0) == "no hat"
    assert MEAN.title("mean", 1 / 3) == "mean 0.333" and MEAN.shown(1 / 3) == "0.33333334"


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.7), (1900.0, 2000.0), (100.0, 101.0)])
def test_numbers_that_are_drawn_cover_the_interval_and_have_names_of_their_own(low, high):
    control = Continuous(low, high)
    drawn = control.random_values(256, random.Random(0))
    assert 255 <= len(drawn) == len(set(map(control.shown, drawn))) == len(set(drawn))
    parts = [int((value - low) / (high - low) * 8) for value in drawn]
    assert set(parts[:40]) == set(range(8)), "in random order"
    assert torch.equal(
        control.read("c", [control.shown(value) for value in drawn], CPU), torch.tensor(drawn)
    )
