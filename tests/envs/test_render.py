"""Frames of episodes: what they show, that they cost nothing, that Gymnasium's wrappers fit."""

import sys
import warnings
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import RecordVideo
from gymnasium.wrappers.vector import RecordVideo as RecordVideos
from numpy.typing import NDArray

from ctrl_rl.envs.frames import RENDERING
from ctrl_rl.errors import ConfigError
from ctrl_rl.pixels import to_pixels

SHORT = ["kernel.num_steps=4"]
DRAWS = {"render_mode": "rgb_array"}


def make(name: str, **settings: Any) -> Any:
    return gymnasium.make(f"ctrl_rl/{name}-v0", **{"overrides": SHORT, **settings})


def make_vec(name: str, n: int, **settings: Any) -> Any:
    return gymnasium.make_vec(f"ctrl_rl/{name}-v0", n, **{"overrides": SHORT, **settings})


def picture(sample: torch.Tensor, factor: int) -> NDArray[np.uint8]:
    pixels = to_pixels(sample).expand(-1, -1, 3).numpy()
    return np.kron(pixels, np.ones((factor, factor, 1), np.uint8))


def test_frame_is_the_clean_estimate_and_in_the_end_the_sample() -> None:
    envs = make_vec("Faces", 2, autoreset_mode="Disabled", **DRAWS)
    process = envs.unwrapped.process
    observation, _ = envs.reset(seed=0)
    for k in range(5):
        frames = envs.render()
        assert isinstance(frames, tuple) and len(frames) == 2
        control = {name: torch.as_tensor(observation[f"control_{name}"]) for name in ("glasses",)}
        x, step = torch.as_tensor(observation["x"]), torch.full((2,), k)
        with torch.no_grad():
            clean = process.prior.decode(process.clean_estimate(x, step, control))
        for frame, sample in zip(frames, clean, strict=True):
            assert frame.dtype == np.uint8 and frame.shape == (256, 256, 3)
            assert np.array_equal(frame, picture(sample, 16))
        if k < 4:
            observation, _, _, _, info = envs.step(np.zeros(envs.action_space.shape))
    for frame, sample in zip(frames, info["sample"], strict=True):
        assert np.array_equal(frame, picture(torch.as_tensor(sample), 16))


def test_frames_of_one_channel_are_grey() -> None:
    env = make("Digits", **DRAWS)
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (256, 256, 3)
    assert (frame == frame[..., :1]).all() and frame.std() > 10


@pytest.mark.parametrize("task", ["Digits", "Mixture2d"])
def test_rendering_changes_no_result_and_costs_nothing_when_not_asked_for(task: str) -> None:
    def play(render: bool, **settings: Any) -> tuple[list[Any], int, int]:
        env = make(task, **settings)
        calls: list[int] = []
        denoiser = env.unwrapped.process.prior.denoiser
        denoiser.register_forward_hook(lambda *call: calls.append(1))
        seen = [env.reset(seed=3)[0]["x"]]
        for _ in range(4):
            if render:
                env.render()
            observation, reward, *_ = env.step(np.full(env.action_space.shape, 0.1, np.float32))
            seen += [observation["x"], reward]
        return seen, len(calls), env.unwrapped.process.prior_calls

    plain, calls, counted = play(False)
    able, with_mode, _ = play(False, **DRAWS)
    drawn, _, still = play(True, **DRAWS)
    assert calls == counted == with_mode == still == 5
    for other in (able, drawn):
        assert all(np.array_equal(*pair) for pair in zip(plain, other, strict=True))


def dot(frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Middle of what has the colour of the current latent, in numbers from -4 to 4."""
    rows, columns = np.nonzero((frame == (31, 119, 180)).all(-1))
    share = (np.array([columns.mean(), rows.mean()]) + 0.5) / 256
    return (share - 0.04) / 0.92 * [8, -8] + [-4, 4]


def test_latent_in_the_plane_is_where_it_is() -> None:
    envs = make_vec("Mixture2d", 5, autoreset_mode="Disabled", **DRAWS)
    places = envs.reset(seed=4)[0]["x"]
    for k in range(4):
        for frame, place in zip(envs.render(), places, strict=True):
            np.testing.assert_allclose(dot(frame), place.clip(-4, 4), atol=0.03)
        observation, _, _, _, info = envs.step(np.full((5, 2), 0.2))
        places = observation["x"] if k < 3 else info["sample"]
    last = envs.render()
    for frame, place in zip(last, places, strict=True):
        np.testing.assert_allclose(dot(frame), place.clip(-4, 4), atol=0.03)
    assert len({frame.tobytes() for frame in last}) == 5  # each shows its own path


def test_latent_on_a_line_moves_to_the_right() -> None:
    env = make("Mixture1d", **DRAWS)
    observation, _ = env.reset(seed=4)
    across = []
    for k in range(5):
        x, y = dot(env.render())
        across.append(x)
        if k < 4:
            assert y == pytest.approx(float(observation["x"][0]), abs=0.03)
            observation, _, _, _, info = env.step(np.zeros(1))
    assert y == pytest.approx(float(info["sample"][0]), abs=0.03)
    assert (np.diff(across) > 0.5).all()


def test_rendering_out_of_order_or_in_another_mode_says_what_to_do() -> None:
    for env in (make("Mixture2d", **DRAWS).unwrapped, make_vec("Mixture2d", 2, **DRAWS)):
        with pytest.raises(ConfigError, match=r"nothing to render; call reset\(\) first"):
            env.render()
    for env in (make("Mixture2d").unwrapped, make_vec("Mixture2d", 2)):
        env.reset()
        with pytest.warns(UserWarning, match="make it with render_mode='rgb_array'"):
            assert env.render() is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's own, of the same
        for made in (make, lambda name, **settings: make_vec(name, 2, **settings)):
            with pytest.raises(ConfigError, match="unknown render_mode 'rgb'; did you mean 'rgb_a"):
                made("Mixture2d", render_mode="rgb")


def test_gymnasium_collects_frames() -> None:
    env = make("Mixture2d", render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(np.zeros(2))
    assert [frame.shape for frame in env.render()] == [(256, 256, 3)] * 2


@pytest.fixture
def films(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Gymnasium's wrappers hand to MoviePy, which needs an older Pillow than ours."""
    made: list[Any] = []

    class Clip:
        def __init__(self, frames: list[NDArray[np.uint8]], fps: int) -> None:
            self.frames, self.fps = list(frames), fps
            made.append(self)

        def write_videofile(self, path: str, logger: Any) -> None:
            self.path = path

    name = "moviepy.video.io.ImageSequenceClip"
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    monkeypatch.setattr(sys.modules[name], "ImageSequenceClip", Clip, raising=False)
    return made


def test_recorded_film_ends_with_the_face(tmp_path: Any, films: list[Any]) -> None:
    env = RecordVideo(make("Faces", **DRAWS), str(tmp_path / "film"))
    env.reset(seed=3)
    for _ in range(4):
        info = env.step(np.zeros(env.action_space.shape))[4]
    env.close()
    (film,) = films
    assert len(film.frames) == 5 and film.fps == RENDERING["render_fps"]
    face = picture(torch.as_tensor(info["sample"]), 16)
    assert np.array_equal(film.frames[-1], face)
    far = [np.abs(frame.astype(float) - face).mean() for frame in film.frames]
    assert far == sorted(far, reverse=True)  # a face emerges


def test_recorded_film_of_several_has_all(tmp_path: Any, films: list[Any]) -> None:
    envs = RecordVideos(make_vec("Mixture2d", 4, **DRAWS), str(tmp_path / "film"))
    envs.reset(seed=3)
    for _ in range(4):
        envs.step(np.zeros((4, 2)))
    envs.close()
    assert [frame.shape for frame in films[0].frames] == [(512, 512, 3)] * 5


def test_frame_times_add_up_to_whole_frames() -> None:
    fps = RENDERING["render_fps"]
    assert all(int(sum([1 / fps] * n) * fps) == n for n in range(1, 200))  # as MoviePy counts
