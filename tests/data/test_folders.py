"""Tables and sub-folders of pictures: labels, and what is refused by file, line and cure."""

import os
from pathlib import Path

import pytest
from picture_folders import HALVES, ROWS, class_folders, image_folder, pixels_of, write_table

from ctrl_rl.data import OfflineDataset, image_dataset
from ctrl_rl.errors import ConfigError


def read(folder: Path, label: str | None = "mood", **settings: object) -> OfflineDataset:
    return image_dataset(path=folder, label=label, fractions=HALVES, **settings)  # type: ignore[arg-type]


def labelled(folder: Path, *labels: str) -> Path:
    """Pictures, two of every label."""
    rows = [(f"{i}.png", label) for i, label in enumerate([*labels, *labels])]
    return image_folder(folder, rows)


# --- labels -----------------------------------------------------------------------------------


def test_names_are_sorted_into_labels(tmp_path: Path) -> None:
    found = read(labelled(tmp_path, "sad", "happy", " angry "))
    assert found.label_names == ("angry", "happy", "sad")
    assert found.labels.tolist() == [2, 1, 0] * 2 and found.num_labels == 3


def test_names_keep_a_given_order(tmp_path: Path) -> None:
    found = read(labelled(tmp_path, "no", "yes", "maybe"), label_names=["yes", "no", "maybe"])
    assert found.label_names == ("yes", "no", "maybe")
    assert found.labels.tolist() == [1, 0, 2] * 2


def test_names_that_are_numbers_must_be_given(tmp_path: Path) -> None:
    folder = labelled(tmp_path, "7", "3")
    assert read(folder, label_names=["3", "7"]).labels.tolist() == [1, 0] * 2
    with pytest.raises(ConfigError, match="every one of 0 to 7, and no picture has 0"):
        read(folder)


def test_whole_labels_are_places_among_given_names(tmp_path: Path) -> None:
    found = read(labelled(tmp_path, "1", "0"), label_names=["no", "yes"])
    assert found.label_names == ("no", "yes") and found.labels.tolist() == [1, 0] * 2


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (["0", "2"], {}, "every one of 0 to 2, and no picture has 1: add some, or correct the"),
        (["0", "1"], {"num_labels": 3}, "every one of 0 to 2, and no picture has 2: add some$"),
        (["0", "2000000000"], {}, r"no picture has 1: .*correct .* of .*1.png \(line 3"),
        (["0", "1"], {"num_labels": 2_000_000_000}, "no picture has 2: add some$"),
        (["0", "1"], {"num_labels": 0}, "dataset.num_labels=0 must be 1 or more"),
        (["0", "9" * 30], {}, r"1.png \(line 3 .* label '9{30}', but labels must be whole"),
        (["0", "3"], {"num_labels": 2}, r"1.png \(line 3 .* label 3, but must have one of 0 to 1"),
        (["0", "-1"], {}, r"1.png \(line 3 .* has the label -1, but must have one of 0 to 0"),
        (["0", "0.5"], {}, r"1.png \(line 3 .* has the label '0.5', but labels must be whole"),
        (["0", "happy"], {}, "0.png .* label '0' and .*1.png .* 'happy': use whole labels or"),
        (["happy", "nan"], {}, r"1.png \(line 3 .* has the label 'nan', but labels must be whole"),
        (["happy", " "], {}, r"1.png \(line 3 of metadata.csv\) has no label: give it one"),
        (["hapy", "sad"], {"label_names": ["happy", "sad"]}, "'hapy', .*did you mean 'happy'"),
        (["sad", "sad"], {"label_names": ["sad", "happy"]}, "no picture has 'happy': add some$"),
        (["a", "b"], {"num_labels": 3}, "every one of 0 to 2, and no picture has 2"),
        (["a", "b"], {"label_names": ["a", "b"], "num_labels": 3}, "must be 3 different names"),
        (["a", "b"], {"label_names": ["a", "a"]}, "must be 2 different names"),
    ],
)
def test_bad_labels_are_refused(
    tmp_path: Path, labels: list[str], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(labelled(tmp_path, *labels), **settings)


# --- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "no column 'file_name'"),
        (b"file_name,mood\n", "metadata.csv has no rows"),
        (b"file_name,modo\n0.png,0\n", "no column 'mood'; did you mean 'modo'"),
        (b"file_name,mood,mood\n0.png,0,1\n", "more than one column 'mood'"),
        (b"file_name;mood\n0.png;0\n", "line 1 of .*metadata.csv separates columns by semicolons"),
        (b"file_name\tmood\n0.png\t0\n", "by tabs: save the table with commas"),
        (b"file_name,mood\n0.png,0\n1.png\n", "line 3 of .*metadata.csv has 1 entries.* 2 columns"),
        (b"file_name,mood\na, b.png,0\n", "line 2 of .* has 3 entries.* quotes around text"),
        (b"file_name,mood\n0.png,0\n1.png,gl\xfccklich\n", "line 3 of .* is not UTF-8: .*iconv"),
        ("file_name,mood\n0.png,0\n".encode("utf-16"), "line 1 of .* is not UTF-8"),
        (b'file_name,mood\n0.png,"0\n1.png,1\n', "line 2 of .* cannot be read.*close every quote"),
        (b"file_name,mood\n0.png," + b"9" * 200_000, "cannot be read .field larger"),
        (b"file_name,mood\n,0\n", "line 2 of .* names '', and .* has no such file"),
        (b"file_name,mood\n9.png,0\n", "line 2 of .* names '9.png', and .* has no such file"),
        (b"file_name,mood\n0\x00.png,0\n", "line 2 of .*names '0.x00.png', which is no file"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, table: bytes, message: str) -> None:
    folder = image_folder(tmp_path, ROWS)
    (folder / "metadata.csv").write_bytes(table)
    with pytest.raises(ConfigError, match=message) as raised:
        read(folder)
    assert "\n" not in str(raised.value)


def test_tables_of_others_are_read(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ROWS)
    lines = ["file_name,mood,prompt", *(f'{name},{mood},"a, b",' for name, mood in ROWS)]
    text = "\r\n".join(lines) + "\r\n\r\n"  # of Excel: a mark, other line ends, an empty column
    (folder / "metadata.csv").write_bytes(text.encode("utf-8-sig"))
    assert read(folder).labels.tolist() == [0, 1] * 4


def test_without_a_label_the_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give dataset.label, .*; accepted: mood$"):
        read(image_folder(tmp_path, ROWS), label=None)


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    secret = image_folder(tmp_path / "elsewhere", [("secret.png", "0")]) / "secret.png"
    folder = image_folder(tmp_path / "folder", ROWS)
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(secret.parent)
    outside = ["../elsewhere/secret.png", str(secret), "link.png", "linked/secret.png"]
    for name in [*outside, str(folder / "0.png")]:
        write_table(folder, [*ROWS, (name, "0")])
        with pytest.raises(ConfigError, match="line 10 of .* is outside of .*: copy") as raised:
            read(folder)
        assert repr(name) in str(raised.value)


def test_files_that_are_no_pictures_are_never_opened(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ROWS)
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    (folder / "loop.png").symlink_to(folder / "loop.png")
    for name in ("pipe.png", "loop.png", "."):
        write_table(folder, [*ROWS, (name, "0")])
        with pytest.raises(ConfigError, match="no such file|no file"):
            read(folder)


def test_links_and_dots_within_the_folder_are_fine(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "folder", ROWS)
    (folder / "sub").mkdir()
    (folder / "7.png").rename(folder / "sub" / "moved.png")
    (folder / "7.png").symlink_to("sub/moved.png")
    (tmp_path / "link").symlink_to(folder)
    write_table(folder, [("sub/../0.png", "0"), *ROWS[1:]])
    assert read(tmp_path / "link").labels.tolist() == [0, 1] * 4


# --- sub-folders ------------------------------------------------------------------------------


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    folder = class_folders(tmp_path, ["dog", "cat"])
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "cat" / "Thumbs.db").write_bytes(b"")
    (folder / "LICENSE.txt").write_text("yours")
    found = read(folder, None)
    assert found.label_names == ("cat", "dog") and found.labels.tolist() == [0] * 4 + [1] * 4
    assert (found.x[5, 0].numpy() == pixels_of(folder / "dog" / "1.png")).all()
    assert read(folder, None, label_names=["dog", "cat"]).labels.tolist() == [1] * 4 + [0] * 4


def test_sub_folders_with_whole_names_are_in_their_order(tmp_path: Path) -> None:
    folder = class_folders(tmp_path, [str(digit) for digit in range(11)], each=2)
    found = read(folder, None)
    assert found.label_names == () and found.num_labels == 11
    assert (found.x[found.labels == 10][1, 0].numpy() == pixels_of(folder / "10" / "1.png")).all()


def test_bad_sub_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder .*absent: give a folder of images with met"):
        read(tmp_path / "absent", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither metadata.csv nor sub-folders"):
        read(tmp_path / "empty", None)
    folder = class_folders(tmp_path / "good", ["cat", "dog"])
    with pytest.raises(ConfigError, match="no .*metadata.csv to have a column mood: .* leave out"):
        read(folder, "mood")
    with pytest.raises(ConfigError, match="test is a folder within a class: give .*nested/top if"):
        read(class_folders(tmp_path / "nested", ["top/train", "top/test"]), None)
    (folder / "bird").mkdir()
    with pytest.raises(ConfigError, match="bird is the folder of a class without any picture"):
        read(folder, None)
    (folder / "bird" / "0.png").symlink_to(tmp_path / "nested" / "top" / "test" / "0.png")
    with pytest.raises(ConfigError, match="the class bird names 'bird/0.png', which is outside"):
        read(folder, None)
    (folder / "bird" / "0.png").unlink()
    (folder / "bird" / "notes.txt").write_text("not a picture")
    with pytest.raises(ConfigError, match="bird/notes.txt cannot be read .*or remove it"):
        read(folder, None)
    (folder / "stray.PNG").write_bytes(b"")
    with pytest.raises(ConfigError, match="stray.PNG has no label: write metadata.csv"):
        read(folder, None)
