"""Pictures and films: same noise, whole pixels, nothing cut off, odd prompts."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_rl.evaluation.compare import compare
from ctrl_rl.evaluation.film import MOST_BYTES, draw_film, strips_of
from ctrl_rl.evaluation.pictures import draw_samples, draw_strips, draw_table
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.evaluation.sheets import Row, lines, sheet, tile_size
from ctrl_rl.evaluation.side_by_side import BEFORE, Comparison, Strip, draw_strip
from ctrl_rl.policies import DriftPolicy, PriorPolicy, StrengthPolicy
from ctrl_rl.runs import loaded as api

LONG = "prompt=" + "word " * 500 + ", size=1"


def strip(title: str, *shape: int, steps: int = 3, n: int = 8) -> Strip:
    generator = torch.Generator().manual_seed(len(title))
    latents = torch.randn(n, steps + 1, *shape, generator=generator)
    return Strip(title, latents, torch.rand(n, *shape, generator=generator) * 2 - 1)


@pytest.mark.parametrize("text", [LONG, "prompt=" + "w" * 500 + ", size=1", "prompt=, size=0", ""])
def test_lines_are_few_and_keep_the_label(text: str) -> None:
    wrapped = lines(text, 28).split("\n")
    assert len(wrapped) <= 3 and all(len(line) <= 28 for line in wrapped)
    assert "".join(wrapped)[-6:] == text[-6:]


def test_a_prompt_of_500_words_leaves_room_for_pictures(tmp_path: Path) -> None:
    before, after = strip("prior", 3, 16, 16), strip(LONG, 3, 16, 16)
    hound = strip("ein Hund 🐕, size=3", 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_samples(
            tmp_path / "a.png",
            compared=[Comparison(before, (after,)), Comparison(before, (hound,))],
            samples={"policy": [after.samples] * 2},
            title=LONG,
        )
        draw_strips(tmp_path / "b.png", [before, after], title=LONG)
        draw_strips(tmp_path / "c.png", [strip("prior", 2), strip(LONG, 2)], title=LONG)
    for name in ("a", "b", "c"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width <= 850 and image.height <= 700


@pytest.mark.parametrize(
    ("size", "shown"),
    [((16, 16), (48, 48)), ((8, 8), (48, 48)), ((28, 28), (56, 56)), ((47, 10), (94, 20))]
    + [((64, 64), (64, 64)), ((512, 512), (96, 96)), ((512, 256), (96, 48))],
)
def test_images_are_enlarged_by_the_smallest_whole_number(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert tile_size(size) == shown


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pixel_is_a_block_of_one_colour_and_nothing_is_cut_off(
    channels: int, tmp_path: Path
) -> None:
    pixels = torch.randint(0, 200, (2, 8, channels, 16, 16), generator=torch.Generator())
    first, second = (
        Strip(str(i), each[:, None], each / 127.5 - 1) for i, each in enumerate(pixels)
    )
    draw_strips(tmp_path / "a.png", [first, second], title="t")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    blocks = np.repeat(np.repeat(pixels.movedim(2, -1).numpy(), 3, 2), 3, 3)
    top, left = _find(picture, blocks[0, 0])
    for i in range(2):
        for j in range(8):
            y, x = top + 52 * i, left + 52 * j
            assert (picture[y : y + 48, x : x + 48] == blocks[i, j]).all()
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edge == 255).all() and (picture[:, left + 52 * 8 :] == 255).all()


def _find(picture: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    height, width = tile.shape[:2]
    for y in range(picture.shape[0] - height):
        for x in range(picture.shape[1] - width):
            if (picture[y, x] == tile[0, 0]).all():
                if (picture[y : y + height, x : x + width] == tile).all():
                    return y, x
    raise AssertionError("the tile is not in the picture")


def test_words_never_reach_the_edge() -> None:
    row = Row("w" * 200, [torch.zeros(1, 1, 8, 8)])
    picture = np.asarray(sheet([row], [1], title="m" * 300, note="m " * 200))
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edge == 255).all()


def test_strips_have_the_noise_of_each_other() -> None:
    process = api.make_process("mixture2d", ["kernel.num_steps=4"])
    policy = DriftPolicy(prior=process.prior, kernel=process.kernel, controls=process.controls)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (found,) = compare(PolicySampler(process, policy), process.conditions, seed=5)
    assert found.before.title == BEFORE and len(found.after) == 4
    alike = draw_strip(
        process, StrengthPolicy(policy, 0.0), process.conditions[2], title="0", seed=5
    )
    assert torch.equal(found.before.samples, alike.samples)
    assert torch.equal(found.before.latents, alike.latents)
    assert found.before.latents.shape == (8, 5, 2)
    for condition, after in zip(process.conditions, found.after, strict=True):
        assert torch.equal(after.latents[:, 0], found.before.latents[:, 0])
        assert not torch.equal(after.samples, found.before.samples)
        more = draw_strip(process, policy, condition, title="", n=9, seed=5)
        torch.testing.assert_close(more.samples[:8], after.samples)
        assert after.title == process.conditions.title(condition)
    # The noise itself: what is left of an action without its mean.
    x, step = found.before.latents, torch.arange(4)
    label = {name: torch.full((8,), y) for name, y in process.conditions[3].items()}
    for k in step:
        noises = []
        for acts, latents in ((PriorPolicy(process.kernel), x), (policy, found.after[3].latents)):
            at = k.expand(8)
            with torch.no_grad():
                loc = process.prior_loc(latents[:, k], at, label)
                loc = acts.loc(latents[:, k], at, label, loc)
            noises.append((latents[:, k + 1] - loc) / process.kernel.scale[k])
        torch.testing.assert_close(*noises, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_film_has_a_frame_per_step_and_holds_the_end(channels: int, tmp_path: Path) -> None:
    shape = (channels, 8, 8)
    compared = [Comparison(strip("a", *shape), tuple(strip("b" * i, *shape) for i in range(7)))]
    strips = strips_of(compared)
    assert len(strips) == 5
    assert draw_film(tmp_path / "a.gif", strips)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 5 and film.info["loop"] == 0
        film.seek(4)
        assert film.info["duration"] == 1500
        end = np.asarray(film.convert("RGB"))
    assert (end[0] == 255).all()
    tile = end[-18 - 48 : -18, -18 - 48 : -18]  # the last one, of whole blocks
    assert (tile == np.repeat(np.repeat(tile[::6, ::6], 6, 0), 6, 1)).all()
    asked = (strips[-1].samples[-1].movedim(0, -1) + 1) * 127.5
    assert np.abs(tile[::6, ::6] - asked.numpy()).mean() < 16  # as near as a palette is


def test_a_film_is_small_or_none(tmp_path: Path) -> None:
    long = [strip(name, 3, 32, 32, steps=100) for name in "abcde"]
    assert draw_film(tmp_path / "a.gif", long)
    assert 100_000 < (tmp_path / "a.gif").stat().st_size <= MOST_BYTES
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 62  # of longer chains some steps are left out
    coded = Strip("latent", torch.zeros(2, 3, 4, 4, 4), torch.zeros(2, 3, 8, 8))
    assert not draw_film(tmp_path / "b.gif", [coded])
    assert not draw_film(tmp_path / "b.gif", [strip("points", 2)])
    assert not (tmp_path / "b.gif").exists()


@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (2, 30)])
def test_what_is_no_image_is_plotted(shape: tuple[int, ...], tmp_path: Path) -> None:
    names = [f"group {i}" for i in range(5)]
    strips = [strip(name, *shape) for name in names]
    samples = {"prior": [s.samples for s in strips], "policy": [s.samples for s in strips]}
    samples["exact"] = [torch.zeros(0, *shape), *samples["prior"][1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_samples(
            tmp_path / "a.png",
            compared=[Comparison(strips[0], tuple(strips))],
            samples=samples,
            title="run",
            figures={"policy": "gap 1.00 nats"},
        )
        rows = {"ctrl": samples["policy"]}
        draw_table(tmp_path / "b.png", rows=rows, headings=names, title="run", count=4)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    assert {(31, 119, 180), (255, 127, 14)} <= set(map(tuple, picture))  # policy, exact
