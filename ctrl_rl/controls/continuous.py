"""Controls that are numbers."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl_rl.controls.control import ANY, Control
from ctrl_rl.errors import ConfigError


@dataclass(frozen=True)
class Continuous(Control):
    """A number in an interval; tensors hold it as float32, and NaN asks for nothing.

    Args:
        low: smallest value.
        high: largest value.

    Raises:
        ConfigError: low and high form no interval.
    """

    low: float
    high: float
    dtype, size = torch.float32, math.inf

    def __post_init__(self) -> None:
        """Refuse bounds that form no interval."""
        if not -math.inf < self.low < self.high < math.inf:
            raise ConfigError(
                f"a control from low={self.low} to high={self.high} has no values; give two "
                "numbers, low < high"
            )

    @property
    def null(self) -> float:
        """NaN."""
        return math.nan

    @property
    def some_value(self) -> float:
        """The middle of the interval."""
        return (self.low + self.high) / 2

    def is_null(self, values: Tensor) -> Tensor:
        """Where values are NaN."""
        return values.isnan()

    def read(self, name: str, given: Any, device: torch.device, hint: str = "") -> Tensor:
        """Numbers [*N] float32 from numbers or text."""
        if isinstance(given, Tensor):
            values = given.to(device).float()
        else:
            values = torch.as_tensor(self._numbers(given, name), device=device).float()
        # In float32: the ends are rounded as the values are, 0.7 to a little less.
        low, high = (torch.tensor(end, dtype=torch.float32, device=device) for end in self._ends())
        if ((values < low) | (values > high)).any():
            raise ConfigError(
                f"control {name}={values.tolist()} is out of range; use numbers from "
                f"{self.low:g} to {self.high:g}, or {ANY} to ask for nothing"
            )
        return values

    def _ends(self) -> tuple[float, float]:
        return self.low, self.high

    def _numbers(self, given: Any, name: str) -> Any:
        if isinstance(given, np.ndarray):
            given = given.tolist()
        if isinstance(given, Sequence) and not isinstance(given, str):
            numbers = [self._numbers(each, name) for each in given]
            if any(isinstance(number, list) for number in numbers):
                raise ConfigError(f"control {name}={given!r} is nested; give one number, or a list")
            return numbers
        try:
            return math.nan if given == ANY else float(given)
        except (TypeError, ValueError):
            raise ConfigError(
                f"control {name}={given!r} is no number; use one from {self.low:g} to "
                f"{self.high:g}, or {ANY} to ask for nothing"
            ) from None

    def random_values(self, n: int, generator: random.Random) -> list[float]:
        """One number from each of n equal parts, in random order, no two the same in float32."""
        width = (self.high - self.low) / n
        drawn = [self.low + (part + generator.random()) * width for part in range(n)]
        values = list({float(np.float32(value)): None for value in drawn})
        generator.shuffle(values)
        return values

    def shown(self, value: float) -> str:
        """The shortest number that is this one in float32."""
        if math.isnan(value):
            return ANY
        return np.format_float_positional(np.float32(value), trim="-")

    def title(self, name: str, value: float) -> str:
        """The control and its number, to three digits."""
        return f"{name.replace('_', ' ')} {value:.3g}"

    def described(self) -> str:
        """The interval."""
        return f"a number from {self.low:g} to {self.high:g}"

    def as_json(self) -> dict[str, float]:
        """The interval."""
        return {"low": self.low, "high": self.high}
