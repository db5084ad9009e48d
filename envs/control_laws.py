"""Laws that draw the control y of every episode."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError


class ControlLaw(ABC):
    """Draws labels 0 .. num_labels - 1."""

    @abstractmethod
    def draw(self, n: int, num_labels: int, generator: torch.Generator) -> Tensor:
        """Draw labels [n] int64 on the generator's device."""

    def check(self, num_labels: int) -> None:  # noqa: B027 (most laws fit every number of labels)
        """Raise `ConfigError` where the law does not fit a control with `num_labels` labels."""


class UniformLaw(ControlLaw):
    """Independent labels, all equally probable."""

    def draw(self, n: int, num_labels: int, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        device = generator.device
        return torch.randint(num_labels, (n,), generator=generator, device=device)


class BalancedLaw(ControlLaw):
    """Every label equally often in a batch, up to one; the order and the remainder are random.

    The same expectation as `UniformLaw` with less variance between batches.
    """

    def draw(self, n: int, num_labels: int, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        device = generator.device
        rounds = -(-n // num_labels)
        keys = torch.rand(rounds, num_labels, generator=generator, device=device)
        labels = keys.argsort(1).flatten()[:n]  # whole rounds, and a random part of the last one
        return labels[torch.randperm(n, generator=generator, device=device)]


class WeightedLaw(ControlLaw):
    """Independent labels with given probabilities.

    Args:
        probabilities: one per label, >= 0; normalised here.
    """

    def __init__(self, *, probabilities: Sequence[float]) -> None:
        self.probabilities = torch.as_tensor(list(probabilities), dtype=torch.float32)
        if (self.probabilities < 0).any() or not self.probabilities.sum() > 0:
            raise ConfigError(
                f"control_law.probabilities={list(probabilities)} must be >= 0, not all 0"
            )

    def check(self, num_labels: int) -> None:
        """One probability per label."""
        if len(self.probabilities) != num_labels:
            raise ConfigError(
                f"control_law.probabilities has {len(self.probabilities)} entries for "
                f"{num_labels} labels; give one per label"
            )

    def draw(self, n: int, num_labels: int, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        weights = self.probabilities.to(generator.device)
        return torch.multinomial(weights, n, replacement=True, generator=generator)


class FixedLaw(ControlLaw):
    """One label for all.

    Args:
        label: 0 .. num_labels - 1.
    """

    def __init__(self, *, label: int) -> None:
        self.label = label

    def check(self, num_labels: int) -> None:
        """The label exists."""
        if not 0 <= self.label < num_labels:
            raise ConfigError(
                f"control_law.label={self.label} is out of range; use 0 to {num_labels - 1}"
            )

    def draw(self, n: int, num_labels: int, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        return torch.full((n,), self.label, dtype=torch.int64, device=generator.device)
