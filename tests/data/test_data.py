"""Splits never overlap, and bad data is refused where it enters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from ctrl_rl.data import (
    DEFAULT_FRACTIONS,
    OfflineDataset,
    array_dataset,
    as_float,
    digits_dataset,
    faces_dataset,
    image_dataset,
)
from ctrl_rl.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "dataset"
HALVES = {"train": 0.5, "evaluation": 0.5}


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
        ({"x": torch.zeros(4)}, r"\[N, \*shape\]"),
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


def test_array_dataset_reads_what_savez_writes(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (20, 3, 4, 4))
    y = np.arange(20, dtype=np.uint8) % 4
    np.savez(tmp_path / "data.npz", x=x, y=y)
    loaded = array_dataset(path=tmp_path / "data.npz", fractions=HALVES)
    assert torch.equal(loaded.x, torch.from_numpy(x).float())
    assert torch.equal(loaded.labels, torch.from_numpy(y).long())
    assert loaded.num_labels == 4 and loaded.split("train")[0].shape == (10, 3, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 2))}, "holds images.*np.savez"),
        ({"x": np.zeros((4, 2)), "y": np.array([0, 1, 0])}, r"integer \[4\]"),
        ({"x": np.zeros((4, 2)), "y": np.array([0.0, 1.0, 0.0, 1.0])}, "y.astype"),
        ({"x": np.zeros((4, 2)), "y": np.array([1, 2, 1, 2])}, "renumber"),
        ({"x": np.zeros(4), "y": np.array([0, 1, 0, 1])}, r"\[N, \*shape\]"),
        ({"x": np.zeros((4, 2), np.uint8), "y": np.array([0, 1, 0, 1])}, "uint8.*127.5"),
        ({"x": np.full((4, 2), 3.0), "y": np.array([0, 1, 0, 1])}, r"\[3, 3\]"),
        ({"x": np.full((4, 2), np.nan), "y": np.array([0, 1, 0, 1])}, "NaN"),
        ({"x": np.zeros((4, 2)), "y": np.array([0, 1, 0, None])}, "not a readable .npz"),
    ],
)
def test_bad_arrays_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        array_dataset(path=tmp_path / "data.npz", fractions=HALVES)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file at .*absent.npz"):
        array_dataset(path=tmp_path / "absent.npz")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="one array without a name"):
        array_dataset(path=tmp_path / "bare.npy")
    for content in (b"", b"not an archive", b"PK\x03\x04 cut off"):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ConfigError, match="not a readable .npz"):
            array_dataset(path=tmp_path / "broken.npz")


def test_configs_build_datasets(tmp_path: Path, digits: OfflineDataset) -> None:
    built = instantiate(OmegaConf.load(CONFIGS / "digits.yaml"))
    assert built.fingerprint == digits.fingerprint
    np.savez(tmp_path / "data.npz", x=np.zeros((40, 1, 4, 4)), y=np.arange(40) % 2)
    config = OmegaConf.load(CONFIGS / "npz.yaml")
    assert instantiate(config, path=str(tmp_path / "data.npz")).num_labels == 2


def image_folder(
    folder: Path, rows: list[tuple[str, str]], sides: tuple[int, int] = (6, 4)
) -> Path:
    """Images of random pixels, all grey, with a label each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, _ in rows:
        pixels = generator.integers(0, 256, (6, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    lines = ["file_name,mood", *(f"{name},{label}" for name, label in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


ROWS = [(f"{i}.png", str(i % 2)) for i in range(8)]


def test_image_dataset_reads_pictures_and_labels(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ROWS)
    loaded = image_dataset(path=folder, label="mood", fractions=HALVES)
    assert loaded.x.shape == (8, 1, 6, 4) and loaded.labels.tolist() == [0, 1] * 4
    with Image.open(folder / "3.png") as image:
        expected = torch.from_numpy(np.array(image))
    assert loaded.x.dtype == torch.uint8 and torch.equal(loaded.x[3, 0], expected)
    assert torch.equal(as_float(loaded.x[3, 0]), expected / 127.5 - 1)
    colour = np.full((10, 10, 3), (255, 0, 127), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "3.png")
    with pytest.raises(ConfigError, match="to make them one"):
        image_dataset(path=folder, label="mood", fractions=HALVES)
    for name, _ in ROWS:
        Image.fromarray(colour).save(folder / name)
    resized = image_dataset(path=folder, label="mood", size=[5, 3], fractions=HALVES)
    assert resized.x.shape == (8, 3, 5, 3)
    assert resized.x[0, :, 2, 1].tolist() == [255, 0, 127]


def test_bad_image_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a folder of images with metadata.csv"):
        image_dataset(path=tmp_path / "absent", label="mood")
    folder = image_folder(tmp_path / "good", ROWS)
    with pytest.raises(ConfigError, match="no column 'modo'; did you mean 'mood'"):
        image_dataset(path=folder, label="modo")
    folder = image_folder(tmp_path / "words", [("a.png", "happy"), ("b.png", "sad")])
    with pytest.raises(ConfigError, match="holds 'happy', which is no whole label"):
        image_dataset(path=folder, label="mood")
    folder = image_folder(tmp_path / "gap", [("a.png", "0"), ("b.png", "2")])
    with pytest.raises(ConfigError, match="every one of 0 to 2, and no picture has 1"):
        image_dataset(path=folder, label="mood")
    folder = image_folder(tmp_path / "top", ROWS)
    with pytest.raises(ConfigError, match="every one of 0 to 2, and no picture has 2"):
        image_dataset(path=folder, label="mood", num_labels=3)
    with pytest.raises(ConfigError, match=r"must be \[height, width\]"):
        image_dataset(path=folder, label="mood", size=[64])
    Image.fromarray(np.zeros((6, 4), dtype=np.uint16)).save(folder / "0.png")
    with pytest.raises(ConfigError, match="has mode I;16, but must be grey or RGB"):
        image_dataset(path=folder, label="mood")
    folder = image_folder(tmp_path / "broken", ROWS)
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="3.png cannot be read"):
        image_dataset(path=folder, label="mood")
    (folder / "metadata.csv").write_text("file_name,mood\n")
    with pytest.raises(ConfigError, match="has no rows"):
        image_dataset(path=folder, label="mood")


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
