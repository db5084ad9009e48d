"""Small networks that map images to logits.

The reward's gradient flows through these networks, so they are smooth (no ReLU, no max pooling)
and treat every example separately (no batch normalisation). The two architectures differ in
inductive bias on purpose: samples that exploit a flaw of the convolutional reward should not also
fool a perceptron that judges them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError

# Positions per side that the head sees: those of an 8x8 image after one stride of 2.
_POSITIONS = 4
_HIDDEN = 64


class ConvolutionalClassifier(nn.Module):
    """Three 3x3 convolutions, the second with stride 2, and a perceptron on a 4x4 grid of features.

    Made for images of 8x8 to 32x32 pixels; about 47,000 parameters at the default width. There is
    no normalisation: a norm divides by the contrast of the image, which bends the logits where a
    reward should be smooth, and pathwise agents learn more slowly from it.

    Attributes:
        arguments: The constructor's arguments, to rebuild the network.
    """

    def __init__(self, *, channels: int, num_labels: int, width: int = 16, seed: int = 0) -> None:
        """Builds the network.

        Args:
            channels: Channels of the images.
            num_labels: Number of classes, at least 2.
            width: Channels after the first convolution; the others have twice as many.
            seed: Seed of the initial weights; the global random state is left alone.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        _check_sizes(num_labels, channels=channels, width=width)
        self.arguments: dict[str, Any] = {
            "channels": channels,
            "num_labels": num_labels,
            "width": width,
            "seed": seed,
        }
        with _seeded_initialisation(seed):
            self.layers = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
                nn.SiLU(),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(_POSITIONS),
                nn.Flatten(),
                nn.Linear(2 * width * _POSITIONS**2, _HIDDEN),
                nn.SiLU(),
                nn.Linear(_HIDDEN, num_labels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [B, channels, H, W] to logits [B, num_labels]."""
        return self.layers(x)


class PerceptronClassifier(nn.Module):
    """A multilayer perceptron on the flattened example: it knows nothing of neighbouring pixels.

    Attributes:
        arguments: The constructor's arguments, to rebuild the network.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        num_labels: int,
        hidden: Sequence[int] = (128, 64),
        seed: int = 0,
    ) -> None:
        """Builds the network.

        Args:
            shape: Shape of one example, such as (1, 8, 8).
            num_labels: Number of classes, at least 2.
            hidden: Units of each hidden layer. The default has about 17,000 parameters on 8x8
                images.
            seed: Seed of the initial weights; the global random state is left alone.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        shape, hidden = list(shape), list(hidden)
        _check_sizes(num_labels, shape=min(shape, default=0), hidden=min(hidden, default=0))
        self.arguments: dict[str, Any] = {
            "shape": shape,
            "num_labels": num_labels,
            "hidden": hidden,
            "seed": seed,
        }
        widths = [prod(shape), *hidden]
        with _seeded_initialisation(seed):
            layers: list[nn.Module] = [nn.Flatten()]
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
                layers += [nn.Linear(inputs, outputs), nn.GELU()]
            self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_labels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps examples [B, *shape] to logits [B, num_labels]."""
        return self.layers(x)


ARCHITECTURES: dict[str, type[nn.Module]] = {
    architecture.__name__: architecture
    for architecture in (ConvolutionalClassifier, PerceptronClassifier)
}
"""The architectures that a saved classifier can name."""


def _check_sizes(num_labels: int, **sizes: int) -> None:
    if num_labels < 2:
        raise ConfigError(f"num_labels={num_labels}, but a classifier needs at least 2 labels")
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} holds {size}, but every size must be 1 or more: raise it")


@contextmanager
def _seeded_initialisation(seed: int) -> Iterator[None]:
    """Layers draw their initial weights from the global CPU generator: seed it, then restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
