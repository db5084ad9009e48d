"""Labels have names: of a classifier's file, in Python, on the command line, in summaries."""

import json

import numpy as np
import pytest
import torch
from running import summary, train
from torch import Tensor, nn

from ctrl_rl import load_run
from ctrl_rl.classifiers.classifier import Classifier
from ctrl_rl.classifiers.networks import PerceptronClassifier
from ctrl_rl.cli.main import main
from ctrl_rl.controls import Categorical
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards import ClassifierReward, FunctionReward, WeightedSum
from ctrl_rl.runs.build import build_heldout, build_process
from ctrl_rl.runs.compose import compose
from ctrl_rl.runs.loaded import make_process

NAMES = {"glasses": ("no", "yes"), "hair": ("black", "light_brown", "red"), "size": ()}


def save_classifiers(folder):
    """One classifier of vectors per control, with its labels' names; the words that choose them."""
    words = []
    for seed, (control, names) in enumerate(NAMES.items()):
        labels = len(names) or 2
        network = PerceptronClassifier(shape=(2,), num_labels=labels, hidden=(8,), seed=seed)
        Classifier(network=network, num_labels=labels, label_names=names).save(folder / control)
        words.append(f"+reward.classifiers.{control}.folder={folder / control}")
        words.append(f"+reward.classifiers.{control}._target_={LOAD}")
    return ["~reward.classifiers.group", *words]


LOAD = "ctrl_rl.classifiers.classifier.Classifier.load"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    words = ["env=mixture2d", "kernel.num_steps=3", "trainer.updates=2", *save_classifiers(folder)]
    return train(folder, "faces", *words)


def test_summary_is_by_names(run):
    keys = list(summary(run)["per_label"])
    assert len(keys) == 12 and keys[0] == "glasses=no, hair=black, size=0"
    assert keys[-1] == "glasses=yes, hair=red, size=1"


def test_name_and_number_draw_the_same(run):
    loaded = load_run(run)
    number = loaded.sample({"glasses": 1, "hair": 2}, n=4)
    for same in (
        {"glasses": "yes", "hair": "red"},
        {"glasses": "1", "hair": "2", "size": "any"},
        {"glasses": ["yes", 1, "1", "yes"], "hair": torch.tensor(2), "size": 2},
    ):
        assert torch.equal(loaded.sample(same, n=4), number)
    assert not torch.equal(loaded.sample({"glasses": "no", "hair": "red"}, n=4), number)


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ({"glases": "yes"}, "unknown control 'glases'; did you mean 'glasses'"),
        ({"hair": "rad"}, "unknown label 'rad' of control hair; did you mean 'red'.*light_brown"),
        ({"hair": 4}, r"use whole labels 0 to 2 \(black, light_brown, red\), or 3 for the null"),
        ("yes", r"the controls glasses \(no, yes\), hair \(black, .*\), size \(0 to 1\); give"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(control, reason, run):
    with pytest.raises(ConfigError, match=reason):
        load_run(run).sample(control, n=2)


def test_command_line_takes_names(run, tmp_path, capsys):
    drawn = []
    for folder, words in (
        ("names", ["control.glasses=yes", "control.hair=red"]),
        ("numbers", ["control.glasses=1", "control.hair=2"]),
    ):
        assert main(["sample", f"run={run}", *words, "n=3", f"out={tmp_path / folder}"]) == 0
        (file,) = (tmp_path / folder).glob("*.npz")
        drawn.append(np.load(file)["samples"])
    assert np.array_equal(*drawn)
    assert (tmp_path / "names" / "sample-glasses=yes,hair=red-strength1-seed0.png").is_file()
    capsys.readouterr()
    assert main(["sample", f"run={run}", "control.glases=yes"]) == 2
    assert "did you mean 'glasses'" in capsys.readouterr().err
    assert main(["sample", f"run={run}"]) == 2
    assert "control.glasses=VALUE (no, yes), control.hair=VALUE (black, " in capsys.readouterr().err


def test_titles_are_plain_words(run):
    process = load_run(run).env.process
    for condition, title, name in (
        ({"glasses": 1, "size": 0}, "glasses, size 0", "glasses=yes, size=0"),
        ({"glasses": 0, "hair": 1}, "no glasses, hair light_brown", "glasses=no, hair=light_brown"),
        ({"glasses": 2, "hair": 0}, "hair black", "glasses=any, hair=black"),
        ({"glasses": 2}, "anything", "glasses=any"),
        ({}, "anything", "(none)"),
    ):
        assert (
            process.conditions.title(condition) == title
            and process.conditions.name(condition) == name
        )
        checked = process.check_control(condition, 1)
        again = dict(pair.split("=") for pair in name.split(", ") if condition)
        assert process.check_control(again, 1) == checked


def test_digits_are_called_as_ever():
    process = make_process("digits", ["kernel.num_steps=3"])
    assert process.controls == {"digit": Categorical(tuple("0123456789"))}
    assert [process.conditions.name(each) for each in process.conditions] == [
        f"digit={i}" for i in range(10)
    ]
    assert process.conditions.title({"digit": 3}) == "digit 3"


class Constant(nn.Module):
    """A user's model, which need not name its labels."""

    num_labels = 2

    def log_probabilities(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2).log_softmax(1)


def test_names_are_the_models_and_numbers_without():
    named = Constant()
    named.label_names = ("any", "none")
    reward = ClassifierReward(classifiers={"a": Constant(), "b": named})
    function = FunctionReward(function=lambda *_: 0, controls={"c": 3}, differentiable=False)
    both = WeightedSum(rewards={"first": reward, "second": function})
    names = {name: control.as_json() for name, control in both.controls.items()}
    assert names == {"a": ["0", "1"], "b": ["any", "none"], "c": ["0", "1", "2"]}
    with pytest.raises(ConfigError, match="controls.c are .* must be 3 different names"):
        function.controls = {"c": ["low", "high", "low"]}

    whole = make_process("mixture2d", ["kernel.num_steps=3"])
    process = DenoisingProcess(prior=whole.prior, kernel=whole.kernel, reward=reward)
    assert process.check_control({"b": "any"}, 1)["b"].tolist() == [0]  # its own label
    assert process.conditions.name({"a": 2, "b": 2}) == "a=any, b=2"


def test_a_fitted_classifier_says_its_names(tmp_path, capsys):
    rows = np.random.default_rng(0).random((200, 1)) < 0.5
    noise = np.random.default_rng(1).normal(0, 0.1, (200, 1, 8, 8))
    np.savez(
        tmp_path / "data.npz",
        x=np.clip(rows[..., None, None] - 0.5 + noise, -1, 1),
        y=rows[:, 0].astype(int),
    )
    words = ["dataset=npz", f"dataset.path={tmp_path / 'data.npz'}", "classifier.epochs=2"]
    words += ["classifier.network.num_labels=2", f"out={tmp_path / 'fitted'}"]
    with pytest.warns(UserWarning, match="all 160 calibration examples are classified right"):
        assert main(["classifier", *words, "dataset.label_names=[dark,light]"]) == 0
    assert "labels (dark, light)" in capsys.readouterr().err
    fitted = json.loads((tmp_path / "fitted" / "classifier.json").read_text())
    assert fitted["label_names"] == ["dark", "light"]

    drawn = tmp_path / "drawn"
    words = ["env=digits", "kernel.num_steps=3", "n=8", "batch_size=8", f"out={drawn}"]
    words += [f"reward.classifiers.digit.folder={tmp_path / 'fitted'}"]
    assert main(["dataset", *words, "~evaluation.heldout.digit"]) == 0
    told = capsys.readouterr().err
    labels = [line.split(",")[1] for line in (drawn / "metadata.csv").read_text().split()[1:]]
    assert set(labels) <= {"0", "1"}
    assert f"digit: dark x {labels.count('0')}, light x {labels.count('1')}" in told


@pytest.mark.parametrize(
    ("judged", "told"),
    [(("yes", "no"), "yes, no"), (("no", "yes", "maybe"), "3 labels")],
)
def test_a_judge_of_other_labels_is_refused(judged, told, tmp_path, capsys):
    network = PerceptronClassifier(shape=(3, 16, 16), num_labels=len(judged), hidden=(4,), seed=0)
    judge = Classifier(network=network, num_labels=len(judged), label_names=judged)
    judge.save(tmp_path / "judge")
    words = ["env=faces", f"evaluation.heldout.hat.folder={tmp_path / 'judge'}"]
    assert main(["train", *words, f"run.root={tmp_path / 'runs'}"]) == 2
    message = capsys.readouterr().err
    assert "evaluation.heldout.hat" in message and told in message and "no, yes" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("judged", [(), ("a bare head", "a photo of a hat")])
def test_a_judge_with_other_words_judges_named_labels(judged, tmp_path):
    network = PerceptronClassifier(shape=(3, 16, 16), num_labels=2, hidden=(4,), seed=0)
    Classifier(network=network, num_labels=2, label_names=judged).save(tmp_path / "judge")
    words = ["env=faces", f"evaluation.heldout.hat.folder={tmp_path / 'judge'}"]
    config = compose("train", words)
    assert set(build_heldout(config, build_process(config))) == {"glasses", "hat"}
