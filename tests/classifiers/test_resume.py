"""A classifier's fit stops, resumes and is killed without a trace in what it writes."""

import os
import signal
from pathlib import Path

import pytest
import torch
from kills import everything, run_child
from safetensors.torch import load_file
from torch import nn

from ctrl_rl.classifiers.fit import fit_classifier, run_classifier_fit
from ctrl_rl.classifiers.folder import CLASSIFIER
from ctrl_rl.classifiers.networks import PerceptronClassifier
from ctrl_rl.classifiers.training import ClassifierFitting
from ctrl_rl.cli.main import main
from ctrl_rl.data import OfflineDataset, digits_dataset
from ctrl_rl.errors import ConfigError, NonFiniteError, RunError
from ctrl_rl.interrupts import Interrupted
from ctrl_rl.marker import locked

SETTINGS = {
    "train_split": "train",
    "calibration_split": "calibration",
    "report_split": "evaluation",
    "epochs": 3,
    "batch_size": 300,  # three updates an epoch, the last one smaller
    "learning_rate": 0.01,
    "weight_decay": 0.05,
    "noise": 0.2,
    "calibration_noise": 0.1,
    "mixup": 1.0,
    "label_smoothing": 0.1,
    "seed": 0,
    "progress": False,
}
WORDS = ["classifier", "classifier=digits", "classifier.epochs=1", "classifier.batch_size=300"]


@pytest.fixture(scope="module")
def digits() -> OfflineDataset:
    return digits_dataset()


def own_network() -> nn.Module:
    """A network of a user's: with random layers, and with statistics beside its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        return nn.Sequential(*layers, nn.Linear(16, 10))


def fit(digits: OfflineDataset, out: Path, **changes: object) -> None:
    settings = {"network": own_network(), **SETTINGS, **changes}
    run_classifier_fit(dataset=digits, out=out, **settings)


def at_update(monkeypatch: pytest.MonkeyPatch, update: int, number: int) -> None:
    real = ClassifierFitting.update

    def update_and_send(self: ClassifierFitting) -> float:
        loss = real(self)
        if self.done + 1 == update:
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(ClassifierFitting, "update", update_and_send)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    fit(digits, folder)
    return everything(folder)


@pytest.mark.parametrize("update", [1, 3, 4, 8, 9])  # within epochs and at their ends
def test_it_stops_and_resumes_bit_for_bit(digits, whole, tmp_path, monkeypatch, update):
    at_update(monkeypatch, update, signal.SIGTERM)
    torch.manual_seed(update)  # the global state is another process's
    before = torch.random.get_rng_state()
    told = f"stopped after update {update} of 9 and saved; re-run the command to resume"
    with pytest.raises(Interrupted, match=told):
        fit(digits, tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    fit(digits, tmp_path / "out")
    assert everything(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_fit_resumes_bit_for_bit(digits, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("ctrl_rl.unfinished.SAVE_EVERY_S", 0.0)
    at_update(monkeypatch, 5, signal.SIGKILL)
    child = os.fork()
    if child == 0:
        fit(digits, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    rest = tmp_path / "out.unfinished"
    state = load_file(rest / "000004.safetensors")
    kinds = {name.partition(".")[0] for name in state}
    assert kinds == {"done", "generator", "layers", "network", "optimizer", "order", "rate"}
    monkeypatch.undo()
    fit(digits, tmp_path / "out")
    assert everything(tmp_path / "out") == whole and not rest.exists()


def test_the_fit_depends_on_no_global_random_state(digits, whole):
    torch.manual_seed(99)
    settings = {**SETTINGS, "network": own_network(), "dataset": digits}
    weights = fit_classifier(**settings)[0].network.state_dict()
    from safetensors.torch import load

    written = load(whole["classifier.safetensors"])
    assert all(torch.equal(value, written[name]) for name, value in weights.items())


def test_what_decides_the_result_must_be_the_same(digits, tmp_path, monkeypatch):
    at_update(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(Interrupted):
        fit(digits, tmp_path / "out")
    monkeypatch.undo()
    other = own_network()
    with torch.no_grad():
        other[1].bias += 1
    turned = OfflineDataset(x=-digits.x, labels=digits.labels, num_labels=10, splits=digits.splits)
    for dataset, changes, reason in (
        (digits, {"mixup": 0.5}, r"another mixup \(1\.0, now 0\.5\); give the earlier one"),
        (digits, {"train_split": "heldout"}, r"another train_split \(train, now heldout\)"),
        (digits, {"network": other}, "another network; give the earlier one"),
        (turned, {}, "another dataset; give the earlier one"),
    ):
        with pytest.raises(ConfigError, match=reason) as told:
            fit(dataset, tmp_path / "out", **changes)
        assert f"remove {tmp_path / 'out.unfinished'} to start anew" in str(told.value)


def test_a_fit_that_diverged_ends_early_and_is_not_resumed(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("ctrl_rl.unfinished.SAVE_EVERY_S", 0.0)
    network = PerceptronClassifier(shape=(1, 8, 8), num_labels=10, hidden=(8,))
    with pytest.raises(NonFiniteError, match="at update [2-9]: the fit diverged, so lower"):
        fit(digits, tmp_path / "out", network=network, learning_rate=1e30)
    assert not list(tmp_path.iterdir())


def test_a_result_that_cannot_be_written_costs_no_fit(digits, whole, tmp_path, monkeypatch):
    def fail(*given, **named):
        raise OSError("disk full")

    monkeypatch.setattr("ctrl_rl.classifiers.fit.reliability_diagram", fail)
    with pytest.raises(RunError, match="disk full; update 9 of 9 is saved: make room"):
        fit(digits, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    monkeypatch.undo()
    monkeypatch.setattr(ClassifierFitting, "update", fail)
    fit(digits, tmp_path / "out")
    assert everything(tmp_path / "out") == whole


def test_only_what_a_fit_wrote_is_replaced(digits, tmp_path):
    description = tmp_path / "classifier.json"
    for content in ("mine", "{}"):
        description.write_text(content)
        with pytest.raises(ConfigError, match="will not write a classifier.*no report.json of one"):
            fit(digits, tmp_path)
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ConfigError, match="it has no report.json of one"):
            fit(digits, tmp_path)
        (tmp_path / "report.json").unlink()
    assert description.read_text() == "{}"
    with pytest.raises(RunError, match="cannot write to"):
        fit(digits, description / "deep")


def test_the_shipped_classifiers_may_be_made_again():
    from ctrl_rl.assets import resolve

    names = ["digits/classifier", "digits/heldout"]
    names += [f"faces/{control}{end}" for control in ("glasses", "hat") for end in ("", "_heldout")]
    for name in names:
        CLASSIFIER.check_replaceable(resolve(f"package://{name}"))


def test_files_are_readable_by_others(digits, tmp_path):
    fit(digits, tmp_path / "out", epochs=1)
    mask = os.umask(0)
    os.umask(mask)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_is_resumed_by_the_same_command(tmp_path, monkeypatch, number):
    monkeypatch.setattr("ctrl_rl.unfinished.SAVE_EVERY_S", 0.0)
    out = tmp_path / "out"
    died = run_child([*WORDS, f"out={out}"], number, at_write=6)  # while the first is saved
    if number == signal.SIGKILL:
        assert died.code == -number
    else:
        told = "ctrl-rl: stopped after update 2 of 3 and saved; re-run the command to resume"
        assert died.code == 130 and died.told.strip().splitlines()[-1] == told
    assert not out.exists()
    assert main([*WORDS, f"out={out}"]) == 0
    resumed = everything(out)
    assert main([*WORDS, f"out={out}"]) == 0  # from the start, in the place of the first
    assert everything(out) == resumed and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_command_is_refused_by_name(tmp_path, capsys):
    with locked(tmp_path / "out.unfinished"):
        assert main([*WORDS, f"out={tmp_path / 'out'}"]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{tmp_path / 'out.unfinished'} is in use by process {os.getpid()}" in told
    assert not (tmp_path / "out").exists()
