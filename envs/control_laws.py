"""Laws that draw the value y of every control in every episode."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl_rl.controls import Continuous, Control, Value
from ctrl_rl.errors import ConfigError


class ControlLaw(ABC):
    """Draws values of a control, never the null value."""

    @abstractmethod
    def draw(self, n: int, control: Control, generator: torch.Generator) -> Tensor:
        """Draw values [n], of the control's dtype, on the generator's device."""

    def check(self, name: str, control: Control) -> None:  # noqa: B027 (most laws fit all)
        """Raise `ConfigError` where the law does not fit the control of that name."""


class UniformLaw(ControlLaw):
    """Independent values, all equally probable."""

    def draw(self, n: int, control: Control, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        device = generator.device
        if isinstance(control, Continuous):
            share = torch.rand(n, generator=generator, device=device)
            return _between(control, share)
        return torch.randint(int(control.size), (n,), generator=generator, device=device)


class BalancedLaw(ControlLaw):
    """Every label equally often in a batch, up to one; the order and the remainder are random.

    From an interval, one number from each of n equal parts.

    The same expectation as `UniformLaw` with less variance between batches.
    """

    def draw(self, n: int, control: Control, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        device = generator.device
        if isinstance(control, Continuous):
            order = torch.randperm(n, generator=generator, device=device)
            share = torch.rand(n, generator=generator, device=device)
            return _between(control, (order + share) / n)
        num_labels = int(control.size)
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

    def check(self, name: str, control: Control) -> None:
        """One probability per label."""
        if len(self.probabilities) != control.size:
            raise ConfigError(
                f"control_law.probabilities has {len(self.probabilities)} entries, and the control "
                f"{name} is {control.described()}; give one per label"
            )

    def draw(self, n: int, control: Control, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        weights = self.probabilities.to(generator.device)
        return torch.multinomial(weights, n, replacement=True, generator=generator)


class FixedLaw(ControlLaw):
    """One value for all.

    Args:
        label: the place or name of a label, or a number, for every control.
    """

    def __init__(self, *, label: Value) -> None:
        self.label = label

    def check(self, name: str, control: Control) -> None:
        """The value exists, and asks for something."""
        value = control.read(name, self.label, torch.device("cpu"))
        if control.is_null(value).any():
            raise ConfigError(
                f"control_law.label={self.label} asks for nothing of {name}; use "
                f"{control.described()}"
            )

    def draw(self, n: int, control: Control, generator: torch.Generator) -> Tensor:
        """Draw [n]."""
        return control.read("", self.label, generator.device).expand(n).clone()


def _between(control: Continuous, share: Tensor) -> Tensor:
    """The numbers at shares [n] of the interval, 0 to 1, float32."""
    low, high = control.low, control.high
    return (share * (high - low) + low).clamp(low, high)
