"""Pictures of a folder: their pixels, and equal ones in one split."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from picture_folders import HALVES, ROWS, image_folder, pixels_of, write_table
from PIL import Image

from ctrl_rl.data import as_float, image_dataset
from ctrl_rl.errors import ConfigError


def read(folder: Path, **settings: object) -> torch.Tensor:
    return image_dataset(path=folder, label="mood", fractions=HALVES, **settings).x  # type: ignore[arg-type]


def with_picture(folder: Path, picture: Image.Image, name: str = "3.png", **saved: object) -> Path:
    """A folder of grey pictures, all but one of random pixels."""
    image_folder(folder, ROWS, sides=(picture.height, picture.width))
    picture.save(folder / name, **saved)
    return folder


def test_image_dataset_reads_pictures_and_labels(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ROWS)
    loaded = image_dataset(path=folder, label="mood", fractions=HALVES)
    assert loaded.x.shape == (8, 1, 6, 4) and loaded.labels.tolist() == [0, 1] * 4
    expected = torch.from_numpy(pixels_of(folder / "3.png"))
    assert loaded.x.dtype == torch.uint8 and torch.equal(loaded.x[3, 0], expected)
    assert torch.equal(as_float(loaded.x[3, 0]), expected / 127.5 - 1)
    assert loaded.num_labels == 2 and loaded.label_names == ()


def test_sizes_and_channels_are_made_one_on_request(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ROWS)
    colour = np.full((10, 10, 3), (255, 0, 127), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "3.png")
    with pytest.raises(ConfigError, match="0.png .* is grey, 6 x 4 and .*3.png .* is colour, 10 x"):
        read(folder)
    with pytest.raises(ConfigError, match="dataset.channels=1 or 3 to make them one"):
        read(folder, size=[5, 3])
    resized = read(folder, size=[5, 3], channels=3)
    assert resized.shape == (8, 3, 5, 3)
    assert resized[3, :, 2, 1].tolist() == [255, 0, 127]
    assert torch.equal(resized[0, 0], resized[0, 2])  # grey
    # Pillow's grey: 0.299 R + 0.587 G + 0.114 B.
    assert read(folder, size=[5, 3], channels=1)[3, 0, 2, 1] == round(0.299 * 255 + 0.114 * 127)


UPRIGHT = {  # EXIF's orientation: how the stored pixels are turned when shown
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    stored = np.arange(9, dtype=np.uint8).reshape(3, 3) * 20
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = with_picture(tmp_path, Image.fromarray(stored), exif=exif)
    assert (read(folder)[3, 0].numpy() == UPRIGHT[orientation](stored)).all()


def test_a_picture_on_its_side_has_the_size_that_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = image_folder(tmp_path, ROWS, sides=(6, 4))
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(folder / "3.png", exif=exif)
    assert read(folder).shape == (8, 1, 6, 4)


COLOURS = np.array([[(200, 100, 0), (0, 50, 250)]], np.uint8)
ALPHA = np.array([[0, 51]], np.uint8)  # clear, and a fifth


def transparent(mode: str) -> Image.Image:
    """Two pixels of COLOURS, or of grey 200 and 100, with ALPHA."""
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    if mode == "LA":
        return Image.fromarray(np.dstack([np.array([[200, 100]], np.uint8), ALPHA]))
    return image


@pytest.mark.parametrize(
    ("background", "behind"),
    [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#ff8000", (255, 128, 0))],
)
def test_transparent_pixels_show_the_background(
    tmp_path: Path, background: str, behind: tuple[int, ...]
) -> None:
    folder = with_picture(tmp_path, transparent("RGBA"))
    found = read(folder, background=background, channels=3)[3, :, 0].T
    mixed = np.array(behind) * 0.8 + COLOURS[0, 1] * 0.2
    assert found[0].tolist() == list(behind)
    np.testing.assert_allclose(found[1].numpy(), mixed, atol=1)


def test_white_is_behind_unless_said_otherwise(tmp_path: Path) -> None:
    folder = with_picture(tmp_path, transparent("RGBA"))
    assert read(folder, channels=3)[3, :, 0, 0].tolist() == [255, 255, 255]


def test_grey_stays_grey_in_front_of_grey(tmp_path: Path) -> None:
    folder = with_picture(tmp_path, transparent("LA"))
    found = read(folder)
    assert found.shape == (8, 1, 1, 2)
    assert found[3, 0, 0].tolist() == [255, round(0.8 * 255 + 0.2 * 100)]
    assert read(folder, background="red", channels=3)[3, :, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_colour_that_stands_for_clear_shows_the_background(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        picture.putpalette([200, 100, 0, 0, 50, 250])
        clear: object = 0
    else:
        picture = Image.new(mode, (2, 1))
        clear = {"L": 0, "RGB": (0, 0, 0), "1": 0}[mode]
        picture.putpixel((1, 0), {"L": 90, "RGB": (0, 50, 250), "1": 1}[mode])
    folder = with_picture(tmp_path, picture, transparency=clear)
    found = read(folder, background="#00ff00", channels=3)[3, :, 0].T.tolist()
    seen = {"P": [0, 50, 250], "L": [90] * 3, "RGB": [0, 50, 250], "1": [255] * 3}
    assert found == [[0, 255, 0], seen[mode]]


def test_palettes_without_transparency_and_opaque_pictures_keep_their_colours(
    tmp_path: Path,
) -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([200, 100, 0, 0, 50, 250])
    opaque = Image.fromarray(np.dstack([COLOURS, np.full((1, 2), 255, np.uint8)]))
    for name, picture in {"palette": palette, "opaque": opaque}.items():
        folder = with_picture(tmp_path / name, picture)
        assert (read(folder, channels=3)[3].permute(1, 2, 0).numpy() == COLOURS).all()


def test_equal_pictures_are_in_one_split(tmp_path: Path) -> None:
    rows = [(f"{i}.png", str(i % 2)) for i in range(24)]
    folder = image_folder(tmp_path, rows)
    Image.open(folder / "0.png").save(folder / "0.bmp")  # the same pixels in another file
    listed = [*rows, ("0.bmp", "0"), ("3.png", "1"), ("5.png", "1"), ("5.png", "1")]
    write_table(folder, listed)
    for seed in range(8):
        splits = image_dataset(path=folder, label="mood", fractions=HALVES, seed=seed).splits
        owner = {row: name for name, rows in splits.items() for row in rows.tolist()}
        assert len(owner) == 28
        assert owner[24] == owner[0] and owner[25] == owner[3]
        assert owner[26] == owner[27] == owner[5]


def test_equal_pictures_with_different_labels_are_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ROWS)
    write_table(folder, [*((name, "sad") for name, _ in ROWS), ("2.png", "happy")])
    fault = r"2.png \(line 4 of metadata.csv\) and .*2.png \(line 10 .*'sad' and 'happy': correct"
    with pytest.raises(ConfigError, match=fault):
        read(folder)


def test_splits_of_different_pictures_are_as_they_were(tmp_path: Path) -> None:
    # What the splits of these eight were before equal pictures were kept together.
    splits = image_dataset(path=image_folder(tmp_path, ROWS), label="mood", fractions=HALVES).splits
    assert {name: rows.tolist() for name, rows in splits.items()} == SPLITS_BEFORE


SPLITS_BEFORE = {"train": [1, 4, 5, 6], "evaluation": [0, 2, 3, 7]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": [64]}, r"\[64\] must be \[height, width\]"),
        ({"size": 64}, r"64 must be \[height, width\]"),
        ({"size": [4.5, 3]}, r"\[4.5, 3\] must be \[height, width\]"),
        ({"size": [4, 0]}, r"\[4, 0\] must be \[height, width\]"),
        ({"channels": 2}, "dataset.channels '2'; .*accepted: 1, 3"),
        ({"background": "whit"}, "dataset.background=whit must be a colour such as white"),
        ({"background": 255}, "dataset.background=255 must be a colour"),
    ],
)
def test_bad_settings_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **settings)


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "broken", ROWS)
    whole = (folder / "3.png").read_bytes()
    for content in (b"", b"no picture", whole[:50], whole[:40] + b"????" + whole[44:]):
        (folder / "3.png").write_bytes(content)
        with pytest.raises(ConfigError, match=r"3.png \(line 5 .*cannot be read.*save it anew"):
            read(folder)
    Image.fromarray(np.zeros((6, 4), dtype=np.uint16)).save(folder / "3.png")
    with pytest.raises(ConfigError, match=r"3.png \(line 5 .* has mode I;16, but must be grey or"):
        read(folder)
    Image.new("CMYK", (4, 6)).save(folder / "3.png", "JPEG")
    with pytest.raises(ConfigError, match="has mode CMYK"):
        read(folder)


@pytest.mark.parametrize("limit", [16, 8])  # a picture of 24 pixels: a warning, and an error
def test_huge_pictures_are_named(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(tmp_path, ROWS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(
        ConfigError, match=r"0.png \(line 2 .* too large .* exceeds limit .*shrink it"
    ):
        read(folder)


def test_the_config_builds_it(tmp_path: Path) -> None:
    config = OmegaConf.load(Path(__file__).parents[2] / "configs" / "dataset" / "images.yaml")
    folder = image_folder(tmp_path, [(f"{i}.png", "ab"[i % 2]) for i in range(40)])
    built = instantiate(config, path=str(folder), label="mood", size=[3, 2])
    assert built.shape == (1, 3, 2) and built.label_names == ("a", "b")
