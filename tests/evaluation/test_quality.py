"""Accuracy per control against counts by hand, and judges of some controls only."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctrl_rl.controls import Categorical
from ctrl_rl.evaluation.quality import Judge, diversity, in_words
from ctrl_rl.runs.progress import show_summary

CONTROLS = {"glasses": Categorical.of(2), "hat_size": Categorical.of(3)}


class Reads:
    """A judge that sees in a sample what one of its dimensions says."""

    def __init__(self, place: int, labels: int) -> None:
        self.place, self.labels = place, labels

    def log_probabilities(self, sample: Tensor) -> Tensor:
        seen = torch.nn.functional.one_hot(sample[:, self.place].long(), self.labels)
        return (seen + 1e-3).log()


def predict(sample: Tensor) -> dict[str, Tensor]:
    return {"glasses": sample[:, 0].long(), "hat_size": sample[:, 1].long()}


HELDOUT = {"glasses": Reads(2, 2), "hat_size": Reads(3, 3)}
FIRST = torch.tensor([[1, 2, 1, 0], [1, 0, 0, 2], [0, 2, 1, 2], [0, 0, 1, 2]]).float()
SECOND = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).float()


def figures(heldout: dict[str, Reads]) -> dict:
    judge = Judge(predict, heldout, CONTROLS)
    parts = [
        judge(FIRST, {"glasses": 1, "hat_size": 2}),
        judge(SECOND, {"glasses": 0, "hat_size": 1}),
    ]
    return judge.combine(parts)


def test_accuracy_per_control_is_what_one_counts() -> None:
    found = figures(HELDOUT)
    assert found["accuracy_per_control"] == {"glasses": 4 / 6, "hat_size": 3 / 6}
    assert found["heldout_accuracy_per_control"] == {"glasses": 5 / 6, "hat_size": 5 / 6}
    assert found["accuracy"] == 2 / 6 and found["heldout_accuracy"] == 4 / 6
    said = "right by a held-out judge: glasses 83 %, hat size 83 %, both 67 %"
    assert in_words(found) == said


def test_a_judge_of_one_control_judges_that_one() -> None:
    found = figures({"hat_size": HELDOUT["hat_size"]})
    assert found["heldout_accuracy"] is None and found["heldout_macro_f1"] is None
    assert found["heldout_accuracy_per_control"] == {"glasses": None, "hat_size": 5 / 6}
    assert in_words(found) == "right by a held-out judge: hat size 83 %"
    whole = figures(HELDOUT)
    assert all(found[key] == whole[key] for key in whole if not key.startswith("heldout"))


def test_a_control_that_was_not_asked_for_is_not_judged() -> None:
    judge = Judge(predict, HELDOUT, CONTROLS)
    alone = judge.combine([judge(FIRST, {"glasses": 1, "hat_size": 3})])
    assert alone["accuracy"] == 2 / 4 and alone["heldout_accuracy"] == 3 / 4
    assert alone["accuracy_per_control"] == {"glasses": 2 / 4, "hat_size": None}
    assert alone["macro_f1"] is None and alone["heldout_macro_f1"] is None
    nothing = judge.combine([judge(FIRST, {"glasses": 2, "hat_size": 3})])
    assert nothing["accuracy"] == 1 and set(nothing["accuracy_per_control"].values()) == {None}


def test_without_judges_nothing_is_said() -> None:
    judge = Judge(lambda sample: None, {}, CONTROLS)
    nothing = judge.combine([judge(FIRST, {"glasses": 1, "hat_size": 2})])
    assert nothing["accuracy_per_control"] == {"glasses": None, "hat_size": None}
    assert in_words(nothing) == ""
    bare = Judge(lambda sample: None, {}, {})
    assert in_words(bare.combine([bare(FIRST, {})])) == ""
    none = Judge(predict, HELDOUT, CONTROLS)
    empty = none.combine([none(FIRST[:0], {"glasses": 1, "hat_size": 2})])
    assert empty["heldout_accuracy_per_control"] == {"glasses": None, "hat_size": None}


def test_no_samples_are_judged_by_networks_that_refuse_none() -> None:
    """As those of transformers do; an evaluation has none where rejection accepted none."""

    def some(sample: Tensor) -> Tensor:
        assert len(sample) > 0
        return sample

    class Refuses(Reads):
        def log_probabilities(self, sample: Tensor) -> Tensor:
            return super().log_probabilities(some(sample))

    judge = Judge(lambda x: predict(some(x)), {"glasses": Refuses(0, 2)}, CONTROLS)
    one = judge(FIRST[:0], {"glasses": 1, "hat_size": 2})
    assert len(one.asked) == 0 and len(one.predicted) == 0 and len(one.right["glasses"]) == 0
    figures = judge.combine([one])
    assert figures["samples"] == 0 and figures["accuracy"] is None
    assert judge(FIRST, {"glasses": 1, "hat_size": 2}).predicted.shape == (len(FIRST),)


@pytest.mark.parametrize("judges", [("glasses", "hat_size"), ("glasses",), ()])
def test_the_table_names_controls_within_80_columns(
    judges: tuple[str, ...], tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = figures({name: HELDOUT[name] for name in judges}) | {"reward": -1.0}
    summary = row | {"agent": "ctrl", "task": "faces", "gap_nats": 0.1, "gap_nats_ci": [0, 1]}
    summary |= {"log_z": 0.0, "ess": 0.5, "contradictions": [], "prior": row, "exact": None}
    show_summary(tmp_path, summary)
    told = capsys.readouterr().err.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in told if str(tmp_path) not in line)
    (glasses,) = [line for line in told if line.startswith(" glasses")]
    (hat,) = [line for line in told if line.startswith(" hat_size")]
    assert glasses.count("0.667 (0.833)" if judges else "0.667") == 2
    assert hat.count({0: "0.500", 1: "0.500 (–)", 2: "0.500 (0.833)"}[len(judges)]) == 2


def test_diversity_is_the_mean_distance_over_the_root_of_the_dimensions() -> None:
    corners = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 12.0]])
    assert diversity(corners) == pytest.approx((5 + 12 + 13) / 3 / 2)
    assert diversity(corners.reshape(3, 1, 2, 2)) == diversity(corners)
    assert diversity(corners[:1]) is None
    # Of white noise in many dimensions any two are sqrt(2 d) apart.
    noise = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert diversity(noise) == pytest.approx(2**0.5, rel=0.01)
