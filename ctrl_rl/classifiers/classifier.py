"""A fitted classifier: a frozen network, its temperature, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ctrl_rl.assets import resolve
from ctrl_rl.classifiers.networks import ARCHITECTURES
from ctrl_rl.controls import check_label_names
from ctrl_rl.errors import ConfigError, did_you_mean, one_line
from ctrl_rl.files import (
    first_not_finite,
    read_object,
    read_tensors,
    write_tensors,
    write_text,
)

WEIGHTS_FILE = "classifier.safetensors"
DESCRIPTION_FILE = "classifier.json"
FORMAT_VERSION = 1


class Classifier(nn.Module):
    """Log-probabilities log p(y | x), scaled by a temperature (Guo et al. 2017, arXiv 1706.04599).

    The network is frozen: it is in evaluation mode and its weights take no gradient. The gradient
    to x remains, since a reward needs it.

    Attributes:
        network: Maps x [B, *shape] to logits [B, num_labels].
        num_labels: Number of classes.
        label_names: Names of the classes, in order; empty if they are numbers.
        temperature: Positive scalar, float32 []; it stays float32 when the classifier is cast.
        shape: Of one example, checked by `log_probabilities`; None if unknown.
        metadata: JSON values about how the classifier was made, saved with it.
    """

    temperature: Tensor

    def __init__(
        self,
        *,
        network: nn.Module,
        num_labels: int,
        temperature: float = 1.0,
        shape: Sequence[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        label_names: Sequence[str] = (),
    ) -> None:
        """Freezes the network, in place.

        Args:
            network: Maps x [B, *shape] to logits [B, num_labels].
            num_labels: Number of classes.
            temperature: Logits are divided by it; it must be finite and above 0.
            shape: Of one example of the fit. Networks that pool accept other shapes too, and are
                then silently wrong.
            metadata: JSON values about how the classifier was made.
            label_names: Names of the classes, in order; none if they are numbers.

        Raises:
            ConfigError: If the temperature is not finite and above 0, or the names do not tell the
                classes apart.
        """
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(
                f"temperature={temperature}, but must be finite and above 0: use 1 for an "
                "uncalibrated classifier"
            )
        check_label_names("label_names", label_names, num_labels)
        self.network = network
        self.num_labels = num_labels
        self.label_names = tuple(label_names)
        self.shape = None if shape is None else tuple(shape)
        self.metadata = dict(metadata or {})
        device = next((parameter.device for parameter in network.parameters()), None)
        self.register_buffer(
            "temperature", torch.tensor(temperature, dtype=torch.float32, device=device)
        )
        self.requires_grad_(False).eval()

    def logits(self, x: Tensor) -> Tensor:
        """Returns the network's logits before the temperature.

        Args:
            x: [B, *shape], any floating dtype; it is cast to the dtype of the weights.

        Returns:
            float32 [B, num_labels].
        """
        weights = next(self.network.parameters(), x)
        return self.network(x.to(weights.dtype)).float()

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Returns log p(y | x) for every label y, in nats.

        This is a log-softmax, which is finite and has a gradient where log(p + 1e-6) is flat.

        Args:
            x: [B, *shape], any floating dtype.

        Returns:
            float32 [B, num_labels], for any dtype of the network.

        Raises:
            ConfigError: If the shape differs from that of the fit's examples.
        """
        if self.shape is not None and x.shape[1:] != self.shape:
            raise ConfigError(
                f"the classifier was fitted on examples of shape {list(self.shape)} and is asked "
                f"about {list(x.shape[1:])}: fit one on such examples, or draw samples like those"
            )
        return torch.log_softmax(self.logits(x) / self.temperature, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Same as `log_probabilities`."""
        return self.log_probabilities(x)

    def save(self, folder: str | Path) -> None:
        """Writes `classifier.safetensors` (weights) and `classifier.json` (everything else).

        Args:
            folder: Created when missing; the two files are overwritten.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format_version": FORMAT_VERSION,
            "architecture": type(self.network).__name__,
            "arguments": getattr(self.network, "arguments", None),
            "num_labels": self.num_labels,
            "label_names": list(self.label_names),
            "shape": None if self.shape is None else list(self.shape),
            # A float32 survives the round trip through a decimal float64 bit for bit.
            "temperature": self.temperature.item(),
            "metadata": self.metadata,
        }
        text = json.dumps(description, indent=2) + "\n"
        write_tensors(folder / WEIGHTS_FILE, self.network.state_dict())
        write_text(folder / DESCRIPTION_FILE, text)

    @classmethod
    def load(cls, folder: str | Path, *, network: nn.Module | None = None) -> Self:
        """Reads what `save` wrote, onto the CPU.

        Args:
            folder: The folder given to `save`, or ``package://NAME`` for one inside the package.
            network: A network of another class, to receive the weights. Omit it for the
                architectures of `ctrl_rl.classifiers.networks`.

        Returns:
            The frozen classifier.

        Raises:
            ConfigError: If a file is missing or corrupt, or the architecture is not known.
        """
        folder = resolve(folder)
        for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"no {name} in {folder.absolute()}: give a folder that Classifier.save wrote"
                )
        try:
            description = read_object(folder / DESCRIPTION_FILE)
            version = description["format_version"]
            if version != FORMAT_VERSION:
                raise ConfigError(
                    f"{folder} has format version {version}, but this release reads version "
                    f"{FORMAT_VERSION}: fit the classifier again"
                )
            if network is None:
                network = _build_network(description["architecture"], description["arguments"])
            # Assigning keeps the saved dtype, and gives a network built on "meta" its storage.
            weights = read_tensors(folder / WEIGHTS_FILE)
            if first_not_finite(weights):
                raise ValueError(f"{first_not_finite(weights)} is not finite")
            network.load_state_dict(weights, assign=True)
            return cls(
                network=network,
                num_labels=description["num_labels"],
                temperature=description["temperature"],
                # Earlier releases did not write these two.
                label_names=description.get("label_names", ()),
                shape=description.get("shape"),
                metadata=description["metadata"],
            )
        except ConfigError as error:
            named = str(folder) in str(error)
            raise (error if named else ConfigError(f"{folder.absolute()}: {error}")) from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = one_line(error)
            raise ConfigError(
                f"the classifier in {folder.absolute()} is corrupt or does not fit its network "
                f"({type(error).__name__}: {reason}): fit it again or copy it afresh"
            ) from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Module.to, .half and .bfloat16 all come through here. They may move the temperature, but
        # rounding it to 8 bits would change every probability.
        temperature = self.temperature
        super()._apply(fn, recurse)
        self.temperature = temperature.to(self.temperature.device)
        return self


def _build_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"unknown architecture {name!r}; {did_you_mean(name, ARCHITECTURES)}; for a class of "
            "your own pass Classifier.load(folder, network=...)"
        )
    # The weights come from the file, so there is no need to draw any.
    with torch.device("meta"):
        return ARCHITECTURES[name](**arguments)
