"""Folders of parquet and arrow files, as Hugging Face `datasets` reads them."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from picture_folders import HALVES, image_folder
from PIL import Image

from ctrl_rl.data import OfflineDataset, hugging_face_dataset
from ctrl_rl.errors import ConfigError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 4, 3), dtype=np.uint8)
NAMES = ["dog", "cat"]  # not sorted


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


def png(pixels: np.ndarray, **saved: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **saved)
    return file.getvalue()


def table(datasets: Any, names: list[str] | None = None, **columns: list[Any]) -> Any:
    """Eight pictures with classes, words and scores."""
    arrow = pytest.importorskip("pyarrow")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.ClassLabel(names=names or NAMES),
            "word": datasets.Value("string"),
            "score": datasets.Value("float32"),
        }
    )
    rows: dict[str, list[Any]] = {
        "image": [{"bytes": png(each), "path": None} for each in PIXELS],
        "kind": [0, 1] * 4,
        "word": ["b", "a"] * 4,
        "score": [0.5] * 8,
    }
    return arrow.table({**rows, **columns}, schema=features.arrow_schema)


def parquet(folder: Path, table: Any, name: str = "data.parquet") -> Path:
    folder.mkdir(exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / name)
    return folder


def on_disk(datasets: Any, table: Any) -> Any:
    memory = datasets.table.InMemoryTable(table)
    return datasets.Dataset(memory, fingerprint="of a test")


def read(folder: Path, label: str = "kind", **settings: Any) -> OfflineDataset:
    return hugging_face_dataset(path=folder, label=label, fractions=HALVES, **settings)


def test_parquet_files_are_read(datasets: Any, tmp_path: Path) -> None:
    found = read(parquet(tmp_path, table(datasets)))
    assert torch.equal(found.x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert found.labels.tolist() == [0, 1] * 4 and found.label_names == ("dog", "cat")
    words = read(tmp_path, "word", label_names=[])
    assert words.label_names == ("a", "b") and words.labels.tolist() == [1, 0] * 4
    assert read(tmp_path, label_names=["x", "y"]).label_names == ("x", "y")


def test_what_save_to_disk_wrote_is_read(datasets: Any, tmp_path: Path) -> None:
    on_disk(datasets, table(datasets)).save_to_disk(str(tmp_path / "saved"))
    found = read(tmp_path / "saved", size=[3, 2])
    assert found.shape == (3, 3, 2) and found.label_names == ("dog", "cat")


def test_parts_are_read_together_or_one_by_one(datasets: Any, tmp_path: Path) -> None:
    whole = table(datasets)
    parquet(tmp_path, whole.slice(0, 6), "train-00000-of-00001.parquet")
    parquet(tmp_path, whole.slice(6), "test-00000-of-00001.parquet")
    assert len(read(tmp_path).x) == 8
    train = read(tmp_path, part="train")
    assert torch.equal(train.x, torch.from_numpy(PIXELS[:6]).permute(0, 3, 1, 2))
    with pytest.raises(ConfigError, match="dataset.part 'tran'; did you mean 'train'"):
        read(tmp_path, part="tran")


def test_pictures_are_made_upright_and_opaque_here_too(datasets: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    clear = np.dstack([PIXELS[1], np.zeros((6, 4), np.uint8)])
    images = [png(PIXELS[0], exif=exif), png(clear), *(png(each) for each in PIXELS[2:])]
    cells = [{"bytes": each, "path": None} for each in images]
    found = read(parquet(tmp_path, table(datasets, image=cells)), background="red")
    assert (found.x[0].permute(1, 2, 0).numpy() == PIXELS[0][::-1, ::-1]).all()
    assert found.x[1].flatten(1).unique(dim=1).tolist() == [[255], [0], [0]]


def test_rows_name_pictures_within_the_folder_only(datasets: Any, tmp_path: Path) -> None:
    secret = image_folder(tmp_path / "elsewhere", [("secret.png", "0")]) / "secret.png"
    for name in (str(secret), "../elsewhere/secret.png"):
        cells = [{"bytes": None, "path": name}] * 8
        folder = parquet(tmp_path / "folder", table(datasets, image=cells))
        with pytest.raises(ConfigError, match="row 0 of part train .*secret.png', which is outsi"):
            read(folder)


def test_bad_tables_are_refused(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder .*absent: give a folder of parquet or arrow"):
        read(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no parquet file"):
        read(image_folder(tmp_path / "pictures", [("0.png", "0")]))
    folder = parquet(tmp_path / "good", table(datasets))
    with pytest.raises(ConfigError, match="dataset.label: .* no column 'kid'; did you mean 'kind'"):
        read(folder, "kid")
    with pytest.raises(ConfigError, match="dataset.image: .* no column 'imag'; did you mean 'ima"):
        read(folder, image="imag")
    with pytest.raises(ConfigError, match="row 0 of part train .* has the label 0.5, but must"):
        read(folder, "score")
    with pytest.raises(ConfigError, match="column score .* does not hold images"):
        read(folder, image="score")
    (folder / "data.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ConfigError, match="datasets cannot read .*good"):
        read(folder)
    cells: list[Any] = [{"bytes": png(each), "path": None} for each in PIXELS]
    with pytest.raises(ConfigError, match="row 3 of part train .* has no image"):
        read(parquet(folder, table(datasets, image=[*cells[:3], None, *cells[4:]])))
    with pytest.raises(ConfigError, match="row 3 of part train .* cannot be read"):
        cells[3] = {"bytes": b"no picture", "path": None}
        read(parquet(folder, table(datasets, image=cells)))
    with pytest.raises(ConfigError, match="row 1 of part train .* has no label"):
        read(parquet(folder, table(datasets, kind=[0, -1] * 4)))


def test_parts_with_other_names_of_labels_are_refused(datasets: Any, tmp_path: Path) -> None:
    parts = {"train": table(datasets), "test": table(datasets, names=["cat", "dog"])}
    both = {name: on_disk(datasets, part) for name, part in parts.items()}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="name their labels differently: choose one"):
        read(tmp_path / "saved")


def test_the_config_builds_it(datasets: Any, tmp_path: Path) -> None:
    config = OmegaConf.load(Path(__file__).parents[2] / "configs" / "dataset" / "hugging_face.yaml")
    config.fractions = HALVES
    built = instantiate(config, path=str(parquet(tmp_path, table(datasets))), label="kind")
    assert built.label_names == ("dog", "cat")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="it is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the package datasets .*: pip install datasets"):
        read(tmp_path)
