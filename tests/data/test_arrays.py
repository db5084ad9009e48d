"""Arrays in an .npz file: what is read, and what hostile files are told."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ctrl_rl.data import array_dataset
from ctrl_rl.errors import ConfigError

HALVES = {"train": 0.5, "evaluation": 0.5}
Y = np.array([0, 1, 0, 1])
X = np.linspace(-1, 1, 8).reshape(4, 2)


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return folder / "data.npz"


def test_array_dataset_reads_what_savez_writes(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (20, 3, 4, 4))
    y = np.arange(20, dtype=np.uint8) % 4
    np.savez(tmp_path / "data.npz", x=x, y=y)
    loaded = array_dataset(path=tmp_path / "data.npz", fractions=HALVES)
    assert torch.equal(loaded.x, torch.from_numpy(x).float())
    assert torch.equal(loaded.labels, torch.from_numpy(y).long())
    assert loaded.num_labels == 4 and loaded.split("train")[0].shape == (10, 3, 4, 4)


def with_value(value: float, row: int) -> np.ndarray:
    x = X.copy()
    x[row, 1] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": X}, "holds images.*np.savez"),
        ({"x": X, "y": Y[:3]}, r"integer \[4\]"),
        ({"x": X, "y": Y.astype(float)}, "y.astype"),
        ({"x": X, "y": Y > 0}, "bool.*y.astype"),
        ({"x": X, "y": Y + 1}, "renumber"),
        ({"x": X, "y": Y * 2_000_000_000}, "2 labels between 0 and 2000000000.*renumber"),
        ({"x": X, "y": Y.astype(np.uint64) * (2**64 - 1)}, "renumber"),
        ({"x": X[:, 0], "y": Y}, r"\[N, \*shape\]"),
        ({"x": X[:, :0], "y": Y}, r"of shape \[4, 0\].*non-empty"),
        ({"x": X.astype(np.uint8), "y": Y}, "uint8.*127.5"),
        ({"x": X.astype(complex), "y": Y}, "complex128.*convert"),
        ({"x": X.astype("U8"), "y": Y}, "<U8.*convert"),
        ({"x": np.full((4, 2), 3.0), "y": Y}, r"data.npz: .*\[3, 3\]"),
        ({"x": (X + 1) * 127.5, "y": Y}, r"x lies in \[0, 255\].*x / 127.5 - 1"),
        ({"x": with_value(np.nan, 2), "y": Y}, "NaN or infinite values in 1 of 4.*row 2"),
        ({"x": with_value(-np.inf, 1), "y": Y}, "NaN or infinite values in 1 of 4.*row 1"),
        ({"x": with_value(1e300, 3), "y": Y}, "NaN or infinite values in 1 of 4.*row 3"),
        ({"x": X, "y": np.array([0, 1, 0, None])}, "not a readable .npz.*Object arrays"),
        ({"x": X.astype(object), "y": Y}, "not a readable .npz.*Object arrays"),
        ({"x": X[[0, 1, 2, 0]], "y": Y}, "row 0 of x and row 3 of x are the same.*0 and 1"),
    ],
)
def test_bad_arrays_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    file = saved(tmp_path, **arrays)
    with pytest.raises(ConfigError, match=message) as raised:
        array_dataset(path=file, fractions=HALVES)
    assert "\n" not in str(raised.value) and "data.npz" in str(raised.value)


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


def header(shape: tuple[int, ...]) -> bytes:
    """A header of float64 numbers, without any."""
    file = io.BytesIO()
    described = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, described)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(10**13, 3), (2**40, 2**40), (10**9,)])
def test_headers_that_promise_too_much_take_no_memory(
    tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", header(shape))
        archive.writestr("y.npy", header((4,)))
    monkeypatch.setattr(np, "load", None)  # nothing is read after the header
    with pytest.raises(ConfigError, match=r"data.npz is not .* promises float64 of shape \["):
        array_dataset(path=tmp_path / "data.npz")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "whole.npz", x=rng.uniform(-1, 1, (40, 9)), y=np.arange(40) % 2)
    whole = (tmp_path / "whole.npz").read_bytes()
    broken = tmp_path / "broken.npz"
    for cut in range(0, len(whole), 97):
        for content in (whole[:cut], whole[:cut] + bytes(40) + whole[cut + 40 :]):
            broken.write_bytes(content)
            with pytest.raises(ConfigError, match=r"broken.npz is not a readable|broken.npz holds"):
                array_dataset(path=broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("x.npy", b"plain text")
        archive.writestr("y.npy", b"plain text")
    with pytest.raises(ConfigError, match="not a readable"):
        array_dataset(path=broken)


def test_pixels_from_0_to_1_are_warned_about(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 1, (20, 1, 2, 2)), np.arange(20) % 2
    with pytest.warns(UserWarning, match=r"no negative value: .* \[-1, 1\] with 2 \* x - 1"):
        array_dataset(path=saved(tmp_path, x=x, y=y), fractions=HALVES)


@pytest.mark.filterwarnings("error")
def test_rescaled_pixels_are_not(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).uniform(-1, 1, (20, 1, 2, 2)), np.arange(20) % 2
    array_dataset(path=saved(tmp_path, x=x, y=y), fractions=HALVES)


def test_equal_rows_are_in_one_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    different = rng.uniform(-1, 1, (60, 3))
    place = rng.integers(0, 60, 200)
    place[:60] = np.arange(60)
    file = saved(tmp_path, x=different[place], y=place % 3)
    splits = array_dataset(path=file).splits
    owners = [
        {name for name, rows in splits.items() if set(rows.tolist()) & set(np.flatnonzero(same))}
        for same in (place == each for each in range(60))
    ]
    assert all(len(owner) == 1 for owner in owners)
    assert torch.equal(torch.cat(list(splits.values())).sort().values, torch.arange(200))
    # Shares are those of different rows: 30, 12, 6 and 12 of 60.
    count = [sum(name in owner for owner in owners) for name in splits]
    assert count == [30, 12, 6, 12]


def test_seeds_of_splits_are_checked(tmp_path: Path) -> None:
    file = saved(tmp_path, x=X, y=Y)
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=f"seed={seed} of the splits must be 0 to 4294967295"):
            array_dataset(path=file, fractions=HALVES, seed=seed)


def test_the_config_builds_it(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (40, 1, 4, 4))
    file = saved(tmp_path, x=x, y=np.arange(40) % 2)
    config = OmegaConf.load(Path(__file__).parents[2] / "configs" / "dataset" / "npz.yaml")
    assert instantiate(config, path=str(file)).num_labels == 2
