"""Hostile files: refused in one line that names them, or of no effect; never run.

    python tests/fuzz_files.py 200 [seed] [subject …]

Every trial takes a whole folder, damages one of its files and calls a command that reads it, in a
child with limits of time and memory and with planted modules in its working directory. Where the
command succeeds, its result must be that of the whole folder, byte for byte: unless the damage is
one that files of this kind cannot show, such as another number in a config.
"""

import contextlib
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hostile
import numpy as np
from children import Called, call, warm_up
from hostile import ANY, CANARY, Damage
from picture_folders import write_table
from PIL import Image
from running import SMALL, train

from ctrl_rl import assets
from ctrl_rl.cli.main import main

_EVIL = "open({canary!r}, 'w')\nclass Thing: ...\ndef thing(sample, control): ...\n"
_PLANTED = ("evil", "wandb", "diffusers_extra", "my_module", "modeling", "pipeline")
_FEW = ["evaluation.prior_samples=4", "evaluation.policy_samples=3", "evaluation.exact_samples=0"]
_DIGITS = ["env=digits", "logger=none", "trainer.updates=1", "trainer.batch_size=4", *_FEW]
_DIGITS += ["kernel.num_steps=3", "trainer.log_z_samples=4"]
_FIT = ["classifier", "classifier=images", "classifier.epochs=12", "classifier.network.channels=1"]
_FIT += ["classifier.learning_rate=0.01"]
_FIT += ["classifier.network.num_labels=2", "classifier.network.width=8"]
_HALVES = "dataset.fractions={train: 0.25, heldout: 0.25, calibration: 0.25, evaluation: 0.25}"

JSON = [hostile.json_edit, hostile.json_other]
YAML = [hostile.yaml_edit, hostile.yaml_edit, hostile.yaml_edit, hostile.yaml_other]
TENSORS = [hostile.header, hostile.tensors]


@dataclass(frozen=True)
class Subject:
    """A folder and a command that reads it.

    Attributes:
        name: of the subject.
        make: makes the whole folder.
        damages: for patterns of its files, what befalls them beside what may befall any.
        words: the command, for the folder and one to write to.
        result: of the command, from the two folders.
        unseen: damages, as their words, that cannot be told from a choice, as a pattern.
    """

    name: str
    make: Callable[[Path], None]
    damages: dict[str, list[Damage]]
    words: Callable[[Path, Path], list[str]]
    result: Callable[[Path, Path], Any]
    unseen: str = "$^"
    any_damage: list[Damage] = field(default_factory=lambda: list(ANY))


def _array(folder: Path, out: Path) -> bytes:
    return next(out.glob("*.npz")).read_bytes()


def _metrics(folder: Path, out: Path) -> str:
    return (out / "run" / "metrics.jsonl").read_text()


def _fitted(folder: Path, out: Path) -> bytes:
    return (out / "fitted" / "classifier.safetensors").read_bytes()


def _summary(run: Path) -> dict[str, Any]:
    read = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in read.items() if key not in ("wall_s", "machine")}


def _run(folder: Path) -> None:
    words = ["trainer.updates=3", "trainer.checkpoint_every=1", "logger=csv"]
    train(folder, "run", *words, *_FEW)


def _cells(folder: Path) -> None:
    assert main(_benchmark(folder, folder / "out")) == 0


def _benchmark(folder: Path, out: Path) -> list[str]:
    few = [word for word in SMALL if not word.startswith("env=")] + ["trainer.updates=2"]
    return [
        *("benchmark", "agents=[ctrl]", "tasks=[gaussian]", "seeds=[1]", "denoiser_calls=null"),
        *(f"overrides={[*few, *_FEW]}", f"root={folder / 'cells'}", f"out={out / 'report'}"),
    ]


def _copied(package: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        hostile.replace(Path(str(assets.resolve(f"package://{package}"))), folder / "copy")

    return make


def _arrays(folder: Path) -> None:
    x, y = _examples()
    np.savez(folder / "data.npz", x=x, y=y)


def _pictures(folder: Path) -> None:
    x, y = _examples()
    (folder / "data").mkdir()
    for place, pixels in enumerate((x[:, 0] * 127.5 + 127.5).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / "data" / f"{place}.png")
    write_table(folder / "data", [(f"{place}.png", str(label)) for place, label in enumerate(y)])


def _examples() -> tuple[np.ndarray, np.ndarray]:
    """Dark and bright pictures, mostly with the right label."""
    generator = np.random.default_rng(0)
    y = np.arange(64) % 2
    x = generator.uniform(-0.6, 0.6, (64, 1, 6, 4)) + 0.3 * (2 * y - 1)[:, None, None, None]
    return x.astype(np.float32), y


def _drawn(folder: Path) -> None:
    assert main(_dataset(folder, 4)) == 0


def _dataset(folder: Path, n: int) -> list[str]:
    return [
        "dataset",
        "env=digits",
        "kernel.num_steps=3",
        "batch_size=2",
        f"n={n}",
        f"out={folder / 'drawn'}",
    ]


_RUN: dict[str, list[Damage]] = {
    "run/config.yaml": YAML,
    "run/.ctrl_rl/run.json": JSON,
    "run/summary.json": JSON,
    "run/metrics.jsonl": [hostile.lines],
    "run/checkpoints/000003/state.json": JSON,
    "run/checkpoints/000003/policy.safetensors": TENSORS,
    "run/checkpoints/000003/training.safetensors": TENSORS,
}
# A number in a config that may be another one, and names that are only shown.
_NUMBERS = r"\w+ is (-1|10*|-1e\+?30|1e\+?300|True|'abc'|'\.\./.*')$"

SUBJECTS = [
    Subject(
        "sample",
        _run,
        _RUN,
        lambda folder, out: ["sample", f"run={folder / 'run'}", "control=1", "n=2", f"out={out}"],
        _array,
        unseen=_NUMBERS,
    ),
    Subject(
        "evaluate",
        _run,
        _RUN,
        lambda folder, out: ["evaluate", f"run={folder / 'run'}"],
        lambda folder, out: _summary(folder / "run"),
        unseen=_NUMBERS,
    ),
    Subject(
        "resume",
        _run,
        {**_RUN, "run/log/scalars/reward.csv": [hostile.lines]},
        lambda folder, out: ["train", f"resume={folder / 'run'}", "checkpoint=2"],
        lambda folder, out: (folder / "run" / "metrics.jsonl").read_text(),
        unseen=_NUMBERS,
    ),
    Subject(
        "benchmark",
        _cells,
        {
            "cells/gaussian/ctrl-s1/summary.json": JSON,
            "cells/gaussian/ctrl-s1/config.yaml": YAML,
            "cells/gaussian/ctrl-s1/metrics.jsonl": [hostile.lines],
            "cells/gaussian/ctrl-s1/.ctrl_rl/run.json": JSON,
        },
        _benchmark,
        lambda folder, out: sorted(file.name for file in (out / "report").iterdir()),
    ),
    Subject(
        "prior",
        _copied("digits/prior"),
        {
            "copy/model_index.json": JSON,
            "copy/scheduler/scheduler_config.json": JSON,
            "copy/unet/config.json": JSON,
            "copy/unet/diffusion_pytorch_model.safetensors": TENSORS,
        },
        lambda folder, out: [
            *("train", *_DIGITS, "agent=reinforce", f"prior.path={folder / 'copy'}"),
            *(f"run.root={out}", "run.name=run"),
        ],
        _metrics,
        unseen=_NUMBERS,
    ),
    Subject(
        "classifier",
        _copied("digits/classifier"),
        {
            "copy/classifier.json": JSON,
            "copy/classifier.safetensors": TENSORS,
        },
        lambda folder, out: [
            *("train", *_DIGITS, "agent=reinforce"),
            *(f"reward.classifiers.digit.folder={folder / 'copy'}",),
            *(f"run.root={out}", "run.name=run"),
        ],
        _metrics,
        unseen=_NUMBERS,
    ),
    Subject(
        "images",
        _pictures,
        {"data/3.png": [hostile.picture] * 4, "data/metadata.csv": [hostile.lines] * 3},
        lambda folder, out: [
            *_FIT,
            *("dataset=images", "dataset.label=mood", f"dataset.path={folder / 'data'}"),
            *(_HALVES, f"out={out / 'fitted'}"),
        ],
        _fitted,
        unseen="animated|webp|16 bits|cmyk|float|swapped|without the last|odd line|cut to",
    ),
    Subject(
        "arrays",
        _arrays,
        {"data.npz": [hostile.array] * 6},
        lambda folder, out: [
            *(*_FIT, "dataset=npz", f"dataset.path={folder / 'data.npz'}", _HALVES),
            f"out={out / 'fitted'}",
        ],
        _fitted,
    ),
    Subject(
        "dataset",
        _drawn,
        {"drawn/dataset.json": JSON, "drawn/metadata.csv": [hostile.lines]},
        lambda folder, out: _dataset(folder, 4),
        lambda folder, out: {file.name: file.read_bytes() for file in (folder / "drawn").iterdir()},
    ),
]


@cache
def _whole(subject: str, folder: Path) -> tuple[Path, Any]:
    """The whole folder of a subject, and the command's result from it."""
    chosen = next(each for each in SUBJECTS if each.name == subject)
    original, copy, out = (folder / f"{subject}-{name}" for name in ("whole", "copy", "out"))
    original.mkdir(parents=True)
    out.mkdir()

    def make() -> int:
        chosen.make(original)
        return 0

    made = call(make)
    assert made.code == 0, made.told
    hostile.replace(original, copy)
    called = _command(chosen.words(copy, out), copy)
    assert called.code == 0, f"{subject}: {called.told}"
    return original, chosen.result(copy, out)


def _command(words: list[str], place: Path) -> Called:
    def action() -> int:
        os.chdir(place)
        return main(words)

    return call(action)


def trial(
    seed: int, folder: Path, chosen: list[str] | None = None
) -> tuple[str, Called, str | None]:
    """One damaged file: what was done to it, how the command ended, what is wrong with that."""
    draw = random.Random(seed)
    subject = draw.choice([each for each in SUBJECTS if chosen is None or each.name in chosen])
    original, expected = _whole(subject.name, folder)
    place, out = folder / f"trial{seed}", folder / f"out{seed}"
    hostile.replace(original, place)
    out.mkdir()
    (place / ".trial").touch()
    for module in _PLANTED:
        (place / f"{module}.py").write_text(_EVIL.format(canary=str(place / CANARY)))
    pattern = draw.choice(list(subject.damages))
    file = place / pattern
    own = subject.damages[pattern]
    damage = draw.choice([*own, *own]) if draw.random() < 0.65 else draw.choice(ANY)
    how = damage(file, draw)
    called = _command(subject.words(place, out), place)
    story = f"{subject.name}: {pattern}: {damage.__name__}: {how}"[:300]
    return story, called, _fault(subject, place, out, file, how, called, expected)


def _fault(
    subject: Subject, place: Path, out: Path, file: Path, how: str, called: Called, expected: Any
) -> str | None:
    if (place / CANARY).exists():
        return f"RAN what the file says: {called.told[-500:]}"
    found = called.fault()
    if found:
        return found
    if called.code == 2:
        names = [file.name, file.parent.name, str(place), "checkpoint", "config.yaml"]
        if not any(name in called.last for name in names):
            return f"does not name the file: {called.last}"
        return f"too long: {called.last}" if len(called.last) > 1500 else None
    if re.search(subject.unseen, how):
        return None
    with contextlib.suppress(OSError, ValueError):
        result = subject.result(place, out)
        return None if result == expected else "took it, with another result"
    return "took it, and has no result"


def trials(
    number: int, seed: int, folder: Path, chosen: list[str] | None = None
) -> Iterator[tuple[str, Called, str | None]]:
    """Many of them, each from a seed of its own, so that one can be had again."""
    for place in range(number):
        one = seed * 1_000_003 + place
        yield trial(one, folder, chosen)
        for name in ("trial", "out"):
            hostile.shutil.rmtree(folder / f"{name}{one}", ignore_errors=True)


def _report() -> None:
    warm_up()
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    chosen = [word for word in sys.argv[3:] if word != "-v"] or None
    ended: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        found = trials(number, seed, Path(folder), chosen)
        for place, (story, called, fault) in enumerate(found):
            ended["fault" if fault else {0: "no effect", 2: "refused"}[called.code or 0]] += 1
            longest = max(longest, called.seconds)
            if fault:
                print(f"FAULT {place}: {story}\n    {fault}", flush=True)
            elif "-v" in sys.argv:
                print(f"{place}: {called.code} {called.seconds:.1f} s {story}", flush=True)
                print(f"    {called.last[:300]}", flush=True)
    shown = ", ".join(f"{name} {count}" for name, count in sorted(ended.items()))
    print(f"{number} files of seed {seed}: {shown}; the longest took {longest:.0f} s")
    sys.exit(1 if ended["fault"] else 0)


if __name__ == "__main__":
    _report()
