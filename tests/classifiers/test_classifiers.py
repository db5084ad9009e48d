"""A classifier is calibrated, frozen, independent of its batch, and survives a save."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from ctrl_rl.classifiers.calibration import CalibrationReport
from ctrl_rl.classifiers.classifier import Classifier
from ctrl_rl.classifiers.fit import fit_classifier, run_classifier_fit
from ctrl_rl.classifiers.networks import (
    ARCHITECTURES,
    ConvolutionalClassifier,
    PerceptronClassifier,
)
from ctrl_rl.data import OfflineDataset, digits_dataset
from ctrl_rl.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "classifier"
SETTINGS = {
    "train_split": "train",
    "calibration_split": "calibration",
    "report_split": "evaluation",
    "epochs": 2,
    "batch_size": 64,
    "learning_rate": 0.005,
    "weight_decay": 0.05,
    "noise": 0.2,
    "calibration_noise": 0.0,
    "mixup": 0.0,
    "label_smoothing": 0.0,
    "seed": 0,
    "progress": False,
}


@pytest.fixture(scope="module")
def digits() -> OfflineDataset:
    return digits_dataset()


def perceptron(**changes: object) -> PerceptronClassifier:
    arguments = {"shape": (1, 8, 8), "num_labels": 10, "hidden": (32,)} | changes
    return PerceptronClassifier(**arguments)  # type: ignore[arg-type]


def convolutional(**changes: int) -> ConvolutionalClassifier:
    return ConvolutionalClassifier(**({"channels": 1, "num_labels": 10} | changes))


def fit(dataset: OfflineDataset, network: nn.Module, **changes: object) -> Classifier:
    classifier, _ = fit_classifier(network=network, dataset=dataset, **(SETTINGS | changes))  # type: ignore[arg-type]
    return classifier


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


both_networks = pytest.mark.parametrize("build", [convolutional, perceptron])


@both_networks
def test_log_probabilities_are_normalised(build: type[nn.Module]) -> None:
    classifier = Classifier(network=build(), num_labels=10, temperature=0.1)
    log_probabilities = classifier.log_probabilities(images())
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(6))
    assert torch.equal(classifier(images()), log_probabilities)


@both_networks
def test_result_is_float32_under_a_bfloat16_network(build: type[nn.Module]) -> None:
    classifier = Classifier(network=build(), num_labels=10, temperature=1.2345)
    expected = classifier.log_probabilities(images())
    classifier.bfloat16()
    found = classifier.log_probabilities(images())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6))
    assert torch.equal(classifier.temperature, torch.tensor(1.2345))


@both_networks
def test_a_row_does_not_depend_on_its_batch(build: type[nn.Module]) -> None:
    classifier = Classifier(network=build(), num_labels=10)
    together = classifier.log_probabilities(images())
    alone = torch.cat([classifier.log_probabilities(row[None]) for row in images()])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


@both_networks
def test_gradient_reaches_x_and_nothing_else(build: type[nn.Module]) -> None:
    classifier = Classifier(network=build(), num_labels=10)
    x = images().requires_grad_()
    classifier.log_probabilities(x)[:, 3].sum().backward()
    assert x.grad is not None and (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_gradient_survives_where_the_label_is_all_but_impossible() -> None:
    classifier = Classifier(network=perceptron(), num_labels=10, temperature=1e-3)
    x = images().requires_grad_()
    least = classifier.log_probabilities(x).amin(1)
    least.sum().backward()
    assert (least < -50).all() and x.grad is not None
    assert (x.grad.flatten(1).norm(dim=1) > 1).all()


@both_networks
def test_networks_are_small_and_seeded(build: type[nn.Module]) -> None:
    state = torch.random.get_rng_state()
    first, again, other = build(), build(), build(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first(images()), again(images()))
    assert not torch.equal(first(images()), other(images()))
    assert sum(parameter.numel() for parameter in first.parameters()) < 100_000


@pytest.mark.parametrize("size", [8, 16, 32])
def test_convolutional_classifier_takes_any_size(size: int) -> None:
    assert convolutional(channels=3)(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: convolutional(channels=0), "channels holds 0"),
        (lambda: convolutional(num_labels=1), "at least 2 labels"),
        (lambda: perceptron(hidden=()), "hidden holds 0"),
        (lambda: perceptron(shape=(1, 0)), "shape holds 0"),
        (lambda: Classifier(network=perceptron(), num_labels=10, temperature=0.0), "temperature=0"),
    ],
)
def test_bad_construction_is_refused(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]


def test_fit_is_bitwise_deterministic(digits: OfflineDataset) -> None:
    network = convolutional()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = fit(digits, network).state_dict()
    torch.manual_seed(99)
    again = fit(digits, network).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    other = fit(digits, network, seed=1).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_split": "train"}, "three different splits"),
        ({"report_split": "calibration"}, "three different splits"),
        ({"train_split": "trian"}, "'trian'.*'train'"),
        ({"epochs": 0}, "epochs=0"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"network": perceptron(num_labels=4)}, r"returns \[1, 4\].*must return \[1, 10\]"),
        ({"network": convolutional(channels=3)}, "fails .*build it for this dataset"),
    ],
)
def test_bad_fit_is_refused(
    digits: OfflineDataset, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(digits, **({"network": perceptron()} | changes))  # type: ignore[arg-type]


@both_networks
def test_save_and_load_are_bitwise(build: type[nn.Module], tmp_path: Path) -> None:
    classifier = Classifier(
        network=build(seed=7).bfloat16(), num_labels=10, temperature=1.1, metadata={"seed": 7}
    )
    classifier.save(tmp_path / "saved")
    state = torch.random.get_rng_state()
    loaded = Classifier.load(tmp_path / "saved")
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in classifier.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == value.dtype
    assert torch.equal(loaded(images()), classifier(images()))
    assert loaded.metadata == {"seed": 7} and loaded.num_labels == 10
    assert loaded.label_names == ()
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_names_of_labels_are_saved_and_older_files_have_none(tmp_path: Path) -> None:
    network = perceptron(num_labels=2)
    Classifier(network=network, num_labels=2, label_names=["no", "yes"]).save(tmp_path)
    assert Classifier.load(tmp_path).label_names == ("no", "yes")
    description = tmp_path / "classifier.json"
    content = json.loads(description.read_text())
    assert content.pop("label_names") == ["no", "yes"]
    description.write_text(json.dumps(content))
    assert Classifier.load(tmp_path).label_names == ()
    for names in (["no"], ["no", "no"], ["no", 1], "no"):
        with pytest.raises(ConfigError, match="must be 2 different names, one per label"):
            Classifier(network=network, num_labels=2, label_names=names)  # type: ignore[arg-type]


def test_a_network_of_your_own_is_loaded_by_giving_it(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    classifier = Classifier(network=build(), num_labels=10)
    classifier.save(tmp_path)
    with pytest.raises(ConfigError, match="unknown architecture 'Sequential'.*network="):
        Classifier.load(tmp_path)
    assert torch.equal(Classifier.load(tmp_path, network=build())(images()), classifier(images()))


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no classifier\.json in"):
        Classifier.load(tmp_path)
    Classifier(network=perceptron(), num_labels=10).save(tmp_path)
    description = tmp_path / "classifier.json"
    good = json.loads(description.read_text())
    for change, message in (
        ({"architecture": "PerceptronClasifier"}, "did you mean 'PerceptronClassifier'"),
        ({"architecture": "ConvolutionalClassifier"}, "corrupt or does not fit"),
        ({"arguments": good["arguments"] | {"hidden": [16]}}, "size mismatch"),
        ({"format_version": 2}, "format version 2"),
        ({"temperature": -1}, "temperature=-1"),
    ):
        description.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            Classifier.load(tmp_path)
        assert "\n" not in str(caught.value)
    for text in ("{", "{}", "[]"):
        description.write_text(text)
        with pytest.raises(ConfigError, match="corrupt"):
            Classifier.load(tmp_path)
    description.write_text(json.dumps(good))
    weights = tmp_path / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="corrupt"):
        Classifier.load(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"no classifier\.safetensors"):
        Classifier.load(tmp_path)


def test_run_writes_everything_and_replaces_only_classifiers(
    digits: OfflineDataset, tmp_path: Path
) -> None:
    def run() -> CalibrationReport:
        return run_classifier_fit(
            network=perceptron(), dataset=digits, out=tmp_path / "out", **SETTINGS
        )

    report = run()
    files = {"classifier.json", "classifier.safetensors", "reliability.png", "report.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == vars(report)
    metadata = Classifier.load(tmp_path / "out").metadata
    assert Classifier.load(tmp_path / "out").label_names == tuple("0123456789")  # the dataset's
    assert metadata["dataset_fingerprint"] == digits.fingerprint
    assert metadata["splits"]["train"] == "train"
    assert run() == report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="'thesis.tex'"):
        run()
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_reward_and_judge_share_neither_data_nor_architecture() -> None:
    reward, judge = (
        OmegaConf.load(CONFIGS / f"{name}.yaml") for name in ("digits", "digits_heldout")
    )
    assert reward.train_split != judge.train_split
    assert reward.network._target_ != judge.network._target_
    used = {reward.train_split, judge.train_split, reward.calibration_split, reward.report_split}
    assert used == set(digits_dataset().splits)
    for config in (reward, judge):
        assert config.network._target_.rsplit(".")[-1] in ARCHITECTURES


def test_reward_classifier_of_the_config_learns_digits(
    digits: OfflineDataset, tmp_path: Path
) -> None:
    run = instantiate(OmegaConf.load(CONFIGS / "digits.yaml"), epochs=20, progress=False)
    report = run(dataset=digits, out=tmp_path / "digits")
    assert report.accuracy > 0.9 and report.macro_f1 > 0.9
