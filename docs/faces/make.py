"""Draw the data set of pixel faces again: python docs/faces/make.py ctrl_rl/assets/faces/data.

It needs node and npm, which install the pinned packages of package-lock.json into a folder that
is removed at the end. Every pixel and label is a function of the number of the face.
"""

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, COLUMNS = 16, 160  # pixels of a face; faces in a row of the sheet
# Disjoint, and large enough for their purpose: the prior's images carry no label in training, each
# classifier is fitted on images that no other network has seen, temperatures need little.
SPLITS = {
    "prior": 7200,
    "glasses": 3600,
    "hat": 3600,
    "glasses_heldout": 2240,
    "hat_heldout": 2240,
    "calibration": 600,
    "evaluation": 1000,
}
# The design's colours by the names that people give them.
HAIR = {
    "black": ["28150a"],
    "brown": ["603a14", "83623b", "603015"],
    "blond": ["cab188", "a78961"],
    "red": ["611c17", "612616", "bd1700"],
    "blue": ["009bbd"],
    "green": ["91cb15"],
}
BACKGROUND = {
    "blue": ["b6e3f4"],
    "purple": ["c0aede"],
    "lavender": ["d1d4f9"],
    "pink": ["ffd5dc"],
    "peach": ["ffdfbf"],
}
CLOTHES = {
    "blue": ["5bc0de", "428bca", "03396c"],
    "green": ["88d8b0", "44c585", "00b159"],
    "red": ["ff6f69", "d11141", "ae0001"],
    "yellow": ["ffeead", "ffd969", "ffc425"],
}
PRESENCE = {"no": ["0"], "yes": ["1"]}
# By control: the column of the drawing's table, and what its values are called.
CONTROLS = {
    "glasses": ("glasses", PRESENCE),
    "hat": ("hat", PRESENCE),
    "hair": ("hair_color", HAIR),
    "background": ("background_color", BACKGROUND),
    "clothes": ("clothing_color", CLOTHES),
}


def main(out: Path) -> None:
    """Draw, name and pack."""
    here, count = Path(__file__).parent, sum(SPLITS.values())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file in ("package.json", "package-lock.json", "draw.mjs"):
            shutil.copy(here / file, work)
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=work, check=True)
        subprocess.run(["node", "draw.mjs", str(count), "."], cwd=work, check=True)
        pack(work, out)


def pack(drawn: Path, out: Path) -> None:
    """One lossless sheet, a table of labels, and a file that names both."""
    faces = np.fromfile(drawn / "pixels.rgb", np.uint8).reshape(-1, COLUMNS, SIDE, SIDE, 3)
    with (drawn / "parts.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    number = {
        control: {part: label for label, parts in enumerate(named.values()) for part in parts}
        for control, (_, named) in CONTROLS.items()
    }
    table = [
        [number[control][row[column]] for control, (column, _) in CONTROLS.items()] for row in rows
    ]
    out.mkdir(parents=True, exist_ok=True)
    sheet = faces.transpose(0, 2, 1, 3, 4).reshape(-1, COLUMNS * SIDE, 3)
    Image.fromarray(sheet).save(out / "sheet.webp", lossless=True, quality=100, method=6)
    with (out / "labels.csv").open("w", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CONTROLS)
        writer.writerows(table)
    about = {
        "controls": {control: list(named) for control, (_, named) in CONTROLS.items()},
        "splits": SPLITS,
    }
    (out / "faces.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{out}: {len(rows)} faces, {(out / 'sheet.webp').stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
