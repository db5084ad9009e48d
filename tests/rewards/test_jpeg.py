"""JPEG sizes against Pillow's files, and their classes against the normal law."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from torch import Tensor

from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards import ClassifierReward, Compressibility, Graded
from ctrl_rl.rewards.jpeg import jpeg_kilobytes

PAPER = [-110.0, -85.0, -60.0]


def jpeg_classes(edges: list[float], std: float) -> Graded:
    return Graded(measure=Compressibility(), edges=edges, std=std)


def images(n: int = 6, channels: int = 3) -> Tensor:
    """From flat to noise: the later, the larger as a file."""
    noise = torch.randn(n, channels, 48, 32, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0, 0.6, n)[:, None, None, None]


@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_are_those_of_files(channels: int) -> None:
    batch = images(channels=channels)
    found = jpeg_kilobytes(batch, quality=80)
    for image, size in zip(batch, found, strict=True):
        array = ((image.clamp(-1, 1).permute(1, 2, 0).numpy() + 1) / 2 * 255).round()
        file = io.BytesIO()
        Image.fromarray(array.astype(np.uint8).squeeze()).save(file, "JPEG", quality=80)
        assert float(size) == pytest.approx(len(file.getvalue()) / 1000)
    assert (found.diff() > 0).all()


def test_log_probabilities_are_those_of_a_normal_error() -> None:
    batch = images(8)
    sizes = jpeg_kilobytes(batch).double().numpy()
    edges = [-1.8, -1.2, -1.1, -0.8]
    found = jpeg_classes(edges, std=0.2).log_probabilities(batch).double().numpy()
    ends = np.asarray([-np.inf, *edges, np.inf])
    for size, row in zip(sizes, found, strict=True):
        probability = np.diff(norm.cdf((ends + size) / 0.2))
        np.testing.assert_allclose(np.exp(row), probability, atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(1), 1.0, atol=1e-5)
    assert np.isfinite(found).all()


def test_far_classes_are_finite_and_fall_with_the_distance() -> None:
    found = jpeg_classes(PAPER, 5.0).log_probabilities(images(2))  # some 1 kB, classes begin at 60
    assert torch.isfinite(found).all() and (found[:, :3].diff(dim=1) > 0).all()
    assert (found[:, 3] > -1e-6).all()


def test_the_most_probable_class_is_the_files() -> None:
    batch = images(12)
    edges = [-1.9, -1.3, -0.9]
    label = jpeg_classes(edges, std=0.01).log_probabilities(batch).argmax(1)
    expected = torch.bucketize(-jpeg_kilobytes(batch), torch.tensor(edges), right=True)
    assert torch.equal(label, expected) and len(label.unique()) == 4


def test_a_sum_with_an_encoder_in_it_has_no_gradient() -> None:
    assert not ClassifierReward(classifiers={"size": jpeg_classes(PAPER, 5.0)}).differentiable


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"edges": [-60, -85]}, "must ascend"),
        ({"edges": []}, "must ascend"),
        ({"std": 0.0}, "must be > 0"),
    ],
)
def test_settings_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Graded(measure=Compressibility(), **{"edges": PAPER, "std": 5.0, **settings})


def test_a_quality_that_encoders_do_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be 1 to 95"):
        Compressibility(quality=100)


def test_vectors_are_no_images() -> None:
    with pytest.raises(ConfigError, match="are no images"):
        jpeg_kilobytes(torch.zeros(4, 2))
