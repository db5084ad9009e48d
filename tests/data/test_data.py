"""Splits never overlap, and bad data is refused where it enters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ctrl_rl.data import (
    DEFAULT_FRACTIONS,
    OfflineDataset,
    digits_dataset,
    faces_dataset,
)
from ctrl_rl.errors import ConfigError
from ctrl_rl.runs.compose import saved

CONFIGS = Path(__file__).parents[2] / "configs" / "dataset"


@pytest.fixture(scope="module")
def digits() -> OfflineDataset:
    return digits_dataset()


def dataset(**changes: object) -> OfflineDataset:
    arguments = {
        "x": torch.zeros(4, 1, 2, 2),
        "labels": torch.tensor([0, 1, 0, 1]),
        "num_labels": 2,
        "splits": {"train": torch.tensor([0, 1]), "evaluation": torch.tensor([2, 3])},
    }
    return OfflineDataset(**(arguments | changes))  # type: ignore[arg-type]


def test_digits_splits_are_disjoint_and_cover_everything(digits: OfflineDataset) -> None:
    rows = torch.cat(list(digits.splits.values()))
    assert list(digits.splits) == list(DEFAULT_FRACTIONS)
    assert torch.equal(rows.sort().values, torch.arange(1797))


def test_no_digit_is_in_two_splits_under_another_row_number(digits: OfflineDataset) -> None:
    images = [set(map(bytes, digits.split(name)[0].flatten(1).numpy())) for name in digits.splits]
    assert len(set.union(*images)) == sum(map(len, images))


def test_digits_are_scaled_and_typed(digits: OfflineDataset) -> None:
    assert digits.x.shape == (1797, 1, 8, 8) and digits.shape == (1, 8, 8)
    assert digits.x.dtype == torch.float32 and digits.labels.dtype == torch.int64
    assert (digits.x.min(), digits.x.max()) == (-1, 1)


@pytest.mark.parametrize("name", DEFAULT_FRACTIONS)
def test_splits_are_stratified(digits: OfflineDataset, name: str) -> None:
    _, labels = digits.split(name)
    whole = digits.labels.bincount() * DEFAULT_FRACTIONS[name]
    assert len(labels) == pytest.approx(1797 * DEFAULT_FRACTIONS[name], abs=1.5)
    # Each of the three cuts rounds a label's count by less than one.
    assert (labels.bincount(minlength=10) - whole).abs().max() < 3


def test_splits_depend_on_the_seed_alone(digits: OfflineDataset) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    again, other = digits_dataset(), digits_dataset(seed=1)
    assert all(torch.equal(digits.splits[name], again.splits[name]) for name in digits.splits)
    assert digits.fingerprint == again.fingerprint != other.fingerprint


def test_unknown_split_names_the_nearest(digits: OfflineDataset) -> None:
    with pytest.raises(ConfigError, match="'evaluatoin'.*'evaluation'"):
        digits.split("evaluatoin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 1, 2, 2).double()}, "float64"),
        ({"x": torch.zeros(4)}, r"in \[-1, 1\] or torch.uint8 pixels, \[N, \*shape\]"),
        ({"x": torch.zeros(4, 0)}, r"of shape \[4, 0\].*non-empty"),
        ({"x": torch.full((4, 2), float("nan"))}, "NaN"),
        ({"x": torch.full((4, 2), 255.0)}, r"\[255, 255\].*rescale"),
        ({"labels": torch.zeros(4)}, "torch.int64"),
        ({"labels": torch.tensor([0, 1])}, "one class index per row"),
        ({"labels": torch.tensor([1, 2, 1, 2])}, r"\[1, 2\].*num_labels=2"),
        ({"splits": {}}, "splits is empty"),
        ({"splits": {"train": torch.tensor([], dtype=torch.int64)}}, "non-empty"),
        ({"splits": {"train": torch.tensor([0, 4])}}, "rows 0 to 4.*rows 0 to 3"),
        ({"splits": {"train": torch.tensor([-1])}}, "rows -1"),
        ({"splits": {"train": torch.tensor([1, 1])}}, "again in 'train'"),
        ({"splits": {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 1])}}, "'a' and again in"),
    ],
)
def test_bad_dataset_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataset(**changes)


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.5, "evaluation": 0.4}, "add up to 1"),
        ({"train": 1.5, "evaluation": -0.5}, "above 0"),
        ({}, "add up to 1"),
        ({"train": 0.999, "evaluation": 0.001}, "cannot cut a stratified split 'train'"),
    ],
)
def test_bad_fractions_are_refused(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits_dataset(fractions=fractions)


def test_configs_build_datasets(digits: OfflineDataset) -> None:
    built = instantiate(OmegaConf.load(CONFIGS / "digits.yaml"))
    assert built.fingerprint == digits.fingerprint


def test_targets_of_earlier_versions_are_found(tmp_path: Path, digits: OfflineDataset) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("dataset:\n  _target_: ctrl_rl.data.sources.digits_dataset\n")
    assert instantiate(saved(file).dataset).fingerprint == digits.fingerprint


@pytest.mark.parametrize("control", ["glasses", "hat", "hair", "background", "clothes"])
def test_no_face_is_in_two_splits(control: str) -> None:
    faces = faces_dataset(control=control)
    assert faces.x.shape == (20480, 3, 16, 16) and faces.x.dtype == torch.uint8
    assert len({face.numpy().tobytes() for face in faces.x}) == 20480  # so rows tell images apart
    assert sum(len(rows) for rows in faces.splits.values()) == 20480
    assert len(set(torch.cat(list(faces.splits.values())).tolist())) == 20480
    assert len(faces.label_names) == faces.num_labels == int(faces.labels.max()) + 1


def test_faces_are_drawn_as_their_labels_say() -> None:
    # Three in ten have glasses, and three in ten a hat: 4 standard errors of 20,480 draws.
    for control in ("glasses", "hat"):
        faces = faces_dataset(control=control)
        share = faces.labels.float().mean().item()
        assert faces.label_names == ("no", "yes") and abs(share - 0.3) < 4 * (0.21 / 20480) ** 0.5
    # The corner of a face is its background: one colour per label.
    faces = faces_dataset(control="background")
    for label in range(faces.num_labels):
        corners = faces.x[faces.labels == label][:, :, 0, 0].unique(dim=0)
        assert len(corners) == 1


def test_unknown_controls_of_faces_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match="glasses"):
        faces_dataset(control="glases")
