"""What every kind of control has in common."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Value = int | float | str  # a label's index or name, or a number
Values = Value | Sequence[Value] | Tensor  # one for all episodes, or one for each

ANY = "any"  # the null value's name, unless a label has it


class Control(ABC):
    """One part of a condition: the values that it can take.

    Attributes:
        dtype: of its values in tensors.
        size: number of values besides the null value; infinity for numbers.
    """

    dtype: torch.dtype
    size: float

    @property
    @abstractmethod
    def null(self) -> int | float:
        """The value that asks for nothing."""

    @property
    @abstractmethod
    def some_value(self) -> int | float:
        """A value that asks for something."""

    @abstractmethod
    def is_null(self, values: Tensor) -> Tensor:
        """Where values ask for nothing: bool, of the same shape."""

    @abstractmethod
    def read(self, name: str, given: Any, device: torch.device, hint: str = "") -> Tensor:
        """Turn one value or many, as people write them, into a tensor of `dtype`.

        Args:
            name: of the control, for messages.
            given: a value, or a sequence of values.
            device: of the result.
            hint: added to the message if a name is unknown.

        Raises:
            ConfigError: a value that does not exist.
        """

    @abstractmethod
    def random_values(self, n: int, generator: random.Random) -> Sequence[int | float]:
        """At most n random values that cover what there is, never the null value."""

    @abstractmethod
    def shown(self, value: float) -> str:
        """The name of a value."""

    @abstractmethod
    def title(self, name: str, value: float) -> str:
        """A value in plain words, such as "no hat", "digit 3" or "mean 0.5"."""

    @abstractmethod
    def described(self) -> str:
        """All values in a few words, such as "no, yes", "0 to 9" or "a number from -2 to 2"."""

    @abstractmethod
    def as_json(self) -> list[str] | dict[str, float]:
        """What `as_control` turns back into this control."""
