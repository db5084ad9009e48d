"""Ways to damage a file, from a generator: each changes the file in its place and says how.

What a payload would run writes a canary: the file CANARY in the folder of the trial.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ctrl_rl.runs import checkpoints

CANARY = "canary"
Damage = Callable[[Path, random.Random], str]
_HUGE = 2**40  # bytes of a file with a hole


class Payload:
    """Writes the canary when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return open, (self.file, "w")


def _canary(file: Path) -> Path:
    """The canary of the trial in whose folder a file lies."""
    return next(each for each in file.parents if (each / ".trial").exists()) / CANARY


# Of any file


def truncated(file: Path, draw: random.Random) -> str:
    size = int(file.stat().st_size * draw.random())
    os.truncate(file, size)
    return f"cut to {size} bytes"


def emptied(file: Path, draw: random.Random) -> str:
    file.write_bytes(b"")
    return "emptied"


def noise(file: Path, draw: random.Random) -> str:
    file.write_bytes(draw.randbytes(200))
    return "random bytes"


def pickled(file: Path, draw: random.Random) -> str:
    file.write_bytes(pickle.dumps(Payload(_canary(file))))
    return "a pickle"


def nul(file: Path, draw: random.Random) -> str:
    content = file.read_bytes()
    place = draw.randrange(len(content) or 1)
    file.write_bytes(content[:place] + b"\x00\xff\xfe" + content[place:])
    return f"NUL and bytes that are no text at {place}"


def missing(file: Path, draw: random.Random) -> str:
    file.unlink()
    return "missing"


def folder(file: Path, draw: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


def loop(file: Path, draw: random.Random) -> str:
    file.unlink()
    file.symlink_to(file.name)
    return "a link to itself"


def dangling(file: Path, draw: random.Random) -> str:
    file.unlink()
    file.symlink_to("nowhere")
    return "a link to nowhere"


def pipe(file: Path, draw: random.Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return "a named pipe"


def device(file: Path, draw: random.Random) -> str:
    file.unlink()
    file.symlink_to("/dev/zero")
    return "a link to /dev/zero"


def hole(file: Path, draw: random.Random) -> str:
    os.truncate(file, _HUGE)
    return "a terabyte of nothing behind it"


ANY: list[Damage] = [
    *(truncated, emptied, noise, pickled, nul, missing, folder, loop, dangling, pipe, device, hole)
]

# Of text with a structure

_ODD: list[Any] = [
    *(None, True, "", "ü\x00", "abc", [], {}, [[[]]], {"a": {"b": 1}}, -1, 10**30, -1e30, 1e300),
    *(float("nan"), float("inf"), float("-inf"), "../../etc/passwd", "${oc.env:HOME}", [None]),
]


def _targets(canary: Path) -> list[dict[str, Any]]:
    return [
        {"_target_": "builtins.open", "file": str(canary), "mode": "w"},
        {"_target_": "os.system", "command": f"touch {canary}"},
        {"_target_": "evil.Thing"},
        {"_target_": "hydra.utils.get_class", "path": "evil.Thing"},
        {"_target_": "ctrl_rl.rewards.FunctionReward", "function": "evil.thing", "controls": {}},
    ]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container with every key of it."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], dict | list):
            found += _places(node[key])
    return found


def _edited(content: Any, canary: Path, draw: random.Random) -> str:
    node, key = draw.choice(_places(content))
    pick = draw.random()
    if pick < 0.2:
        del node[key]
        return f"without {key}"
    if pick < 0.3:
        node[key] = draw.choice(_targets(canary))
        return f"{key} is {node[key]}"
    node[key] = draw.choice(_ODD)
    return f"{key} is {node[key]!r}"


def json_edit(file: Path, draw: random.Random) -> str:
    content = json.loads(file.read_text())
    how = _edited(content, _canary(file), draw)
    file.write_text(json.dumps(content))
    return how


def json_other(file: Path, draw: random.Random) -> str:
    texts = ["[]", "null", "3", '"x"', "{}", "[" * 5000 + "]" * 5000, '{"a":' * 3000, "NaN"]
    texts += ["1" * 5000, '{"a": 1e999}', "[{}]", "{,}", "\ufeff{}"]
    text = draw.choice(texts)
    file.write_text(text)
    return f"{text[:20]!r}"


def yaml_edit(file: Path, draw: random.Random) -> str:
    content = yaml.safe_load(file.read_text())
    how = _edited(content, _canary(file), draw)
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    return how


def yaml_other(file: Path, draw: random.Random) -> str:
    canary, text = _canary(file), file.read_text()
    bomb = "".join(f"x{n + 1}: &x{n + 1} [{f'*x{n}, ' * 9}]\n" for n in range(12))
    texts = [
        f"a: !!python/object/apply:os.system ['touch {canary}']\n{text}",
        f"a: !!python/object/apply:builtins.open ['{canary}', 'w']\n{text}",
        f"x0: &x0 [1]\n{bomb}{text}",
        f"{text}\nseed: 5\n",
        f"{text}\nmore: {'[' * 20_000}\n",
        f"{text}\n? [1, 2]\n: 3\n",
        f"{text}\n1: 2\nnull: 3\n",
        *(
            "[]",
            "null",
            "3",
            "x",
            f"{text}---\n{text}",
            "\t",
            "a: *b",
            f"{text}\nwhen: 2020-01-01\n",
        ),
        f"{text}\nn: 0b{'1' * 4000}\nm: 1{'0' * 6000}\nk: 1:{'59:' * 3000}1\n",
    ]
    chosen = draw.choice(texts)
    file.write_text(chosen)
    return f"{chosen[:30]!r} … {chosen[-30:]!r}"


def lines(file: Path, draw: random.Random) -> str:
    """Of metrics.jsonl and csv files."""
    found = file.read_text().splitlines(keepends=True)
    how = draw.choice(["twice", "swapped", "without the first", "without the last", "odd line"])
    if how == "twice":
        found = [found[0], *found]
    elif how == "swapped":
        found = found[::-1]
    elif how == "odd line":
        odd = ["\x00\n", '{"update": NaN}\n', "a,b,c,d\n", '"' * 9 + "\n", "x" * 200_000 + "\n"]
        odd += ["../../../etc/passwd,0\n", "/etc/passwd,1\n", "0.png\n", "0.png,\n", ",\n"]
        found.insert(draw.randint(0, len(found)), draw.choice(odd))
    else:
        found = found[1:] if "first" in how else found[:-1]
    file.write_text("".join(found))
    return how


# Of safetensors


def _rehashed(file: Path) -> None:
    """Let a checkpoint that was changed look whole."""
    state_file = file.parent / "state.json"
    if state_file.is_file():
        state = json.loads(state_file.read_text())
        state["sha256"] = {name: checkpoints._hash(file.parent / name) for name in state["sha256"]}
        state.pop("state_sha256", None)
        state_file.write_text(json.dumps(state))


def header(file: Path, draw: random.Random) -> str:
    content = file.read_bytes()
    [size] = struct.unpack("<Q", content[:8])
    about = json.loads(content[8 : 8 + size])
    name = draw.choice([key for key in about if key != "__metadata__"])
    how = draw.choice(["length", "shape", "dtype", "offsets", "overlap", "garbage", "name"])
    if how == "length":
        size = draw.choice([2**63, 2**40, 0, size + 1, size - 1])
        file.write_bytes(struct.pack("<Q", size) + content[8:])
    else:
        if how == "shape":
            about[name]["shape"] = draw.choice([[2**40, 2**40], [-1], [0], [1] * 70, "x", []])
        elif how == "dtype":
            about[name]["dtype"] = draw.choice(["F64", "I8", "BOOL", "X", None, 3])
        elif how == "offsets":
            about[name]["data_offsets"] = draw.choice([[0, 2**60], [8, 0], [-8, 0], [0], None])
        elif how == "overlap":
            for each in about:
                about[each] = about[name]
        elif how == "name":
            about[draw.choice(["x", "../x", "ü", "", "a" * 9999])] = about.pop(name)
        text = json.dumps(about).encode() if how != "garbage" else draw.randbytes(size)
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    _rehashed(file)
    return f"header: {how} of {name}"


def tensors(file: Path, draw: random.Random) -> str:
    content = load_file(file)
    name = draw.choice(list(content))
    how = draw.choice(["nan", "inf", "without", "more", "other shape", "other type", "none"])
    if how in ("nan", "inf"):
        content[name] = torch.full_like(content[name].float(), float(how))
    elif how == "without":
        content.pop(name)
    elif how == "more":
        content["more"] = torch.zeros(3)
    elif how == "other shape":
        content[name] = torch.zeros(3, 5, 7)
    elif how == "other type":
        content[name] = torch.zeros(content[name].shape, dtype=torch.complex64)
    else:
        content = {}
    save_file(content, file)
    _rehashed(file)
    return f"{name}: {how}"


# Of pictures


def _bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    about = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packed = zlib.compress(b"\x00" * 1_000_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def picture(file: Path, draw: random.Random) -> str:
    how = draw.choice(["bomb", "no size", "animated", "16 bits", "cmyk", "webp", "svg", "float"])
    with Image.open(file) as image:
        before = image.convert("L")
    if how in ("bomb", "no size"):
        file.write_bytes(_bomb(60_000 if how == "bomb" else 0))
    elif how == "animated":
        frames = [before, before.point(lambda value: 255 - value)]
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
    elif how == "webp":
        frames = [before.convert("RGB"), before.convert("RGB").transpose(1)]
        frames[0].save(file, format="WEBP", save_all=True, append_images=frames[1:])
    elif how == "16 bits":
        Image.fromarray(np.asarray(before).astype(np.uint16) * 257).save(file, format="PNG")
    elif how == "float":
        Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(file, format="TIFF")
    elif how == "cmyk":
        before.convert("CMYK").save(file, format="JPEG", quality=100)
    else:
        file.write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>')
    return how


# Of arrays


def array(file: Path, draw: random.Random) -> str:
    with np.load(file) as archive:
        x, y = archive["x"], archive["y"]
    how = draw.choice(
        ["objects", "shape", "nested", "no x", "text", "nan", "range", "labels", "uneven", "empty"]
    )
    if how == "objects":
        odd = np.array([Payload(_canary(file))] * len(y), dtype=object)
        np.savez(file, x=odd, y=y)
    elif how == "shape":
        about = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1, 8, 8)}"
        about = about.ljust(117) + "\n"
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(about)) + about.encode()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", head + b"\x00" * 10_000_000)
    elif how == "nested":
        with io.BytesIO() as inner:
            np.savez(inner, x=x, y=y)
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("x.npy", inner.getvalue())
                archive.writestr("y.npy", inner.getvalue())
    else:
        changed: dict[str, dict[str, Any]] = {
            "no x": {"x": None},
            "text": {"x": x.astype(str)},
            "nan": {"x": np.full_like(x, np.nan)},
            "range": {"x": x * 1000 + 5},
            "labels": {"y": y - 5},
            "uneven": {"y": y[:-1]},
            "empty": {"x": x[:0], "y": y[:0]},
        }
        kept = {"x": x, "y": y} | changed[how]
        np.savez(file, **{name: each for name, each in kept.items() if each is not None})
    return how


def replace(original: Path, target: Path) -> None:
    """A fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original, target)
