"""Controls with labels, and checks of label names."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl_rl.controls.control import ANY, Control
from ctrl_rl.errors import ConfigError, did_you_mean

_MOST_SHOWN = 12  # names in a list


@dataclass(frozen=True)
class Categorical(Control):
    """One of several labels; tensors hold their indices, int64.

    Args:
        names: of the labels, in order.

    Raises:
        ConfigError: no names, or names that do not tell the labels apart.
    """

    names: tuple[str, ...]
    dtype = torch.int64

    def __post_init__(self) -> None:
        """Refuse missing or ambiguous names."""
        object.__setattr__(self, "names", tuple(self.names))
        check_label_names("names of a control's labels", self.names, max(len(self.names), 1))
        if not self.names:
            raise ConfigError("a control needs one label or more")

    @classmethod
    def of(cls, num_labels: int, names: Sequence[str] = ()) -> "Categorical":
        """`num_labels` labels, called "0", "1" and so on unless named."""
        check_label_names("names of a control's labels", names, num_labels)
        return cls(tuple(names) or tuple(map(str, range(num_labels))))

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of labels."""
        return len(self.names)

    @property
    def null(self) -> int:
        """The index after the last label."""
        return len(self.names)

    @property
    def some_value(self) -> int:
        """The last label."""
        return len(self.names) - 1

    def is_null(self, values: Tensor) -> Tensor:
        """Where indices are after the last label."""
        return values == self.null

    def read(self, name: str, given: Any, device: torch.device, hint: str = "") -> Tensor:
        """Indices [*N] int64 of labels given by name, index, or index as text."""
        label = torch.as_tensor(self._places(given, name, hint), device=device)
        if label.is_floating_point() or ((label < 0) | (label > self.size)).any():
            known = "" if _are_numbers(self.names) else f" ({_listed(self.names)})"
            raise ConfigError(
                f"control {name}={label.tolist()} is out of range; use whole labels 0 to "
                f"{self.size - 1}{known}, or {self.size} for the null label"
            )
        return label.long()

    def _places(self, given: Any, name: str, hint: str) -> Any:
        """The same with indices for names, also in lists; anything else unchanged."""
        if isinstance(given, str):
            return self._place(given, name, hint)
        if isinstance(given, np.ndarray):
            given = given.tolist()
        if isinstance(given, Sequence):
            return [self._places(each, name, hint) for each in given]
        return given

    def _place(self, text: str, name: str, hint: str) -> int:
        if text in self.names:
            return self.names.index(text)
        if text == ANY:
            return self.null
        try:
            return int(text)
        except ValueError:
            nearest = did_you_mean(text, [*self.names, ANY]) + hint
            raise ConfigError(f"unknown label '{text}' of control {name}; {nearest}") from None

    def random_values(self, n: int, generator: random.Random) -> list[int]:
        """Independent random indices."""
        return [generator.randrange(self.size) for _ in range(n)]

    def shown(self, value: float) -> str:
        """The label's name."""
        if value < self.size:
            return self.names[int(value)]
        return str(int(value)) if ANY in self.names else ANY

    def title(self, name: str, value: float) -> str:
        """The control and its label; "hat" or "no hat" for labels no and yes."""
        words = name.replace("_", " ")
        if self.names == ("no", "yes"):
            return ("no " if value == 0 else "") + words
        return f"{words} {self.names[int(value)]}"

    def described(self) -> str:
        """The names."""
        return _listed(self.names)

    def as_json(self) -> list[str]:
        """The names."""
        return list(self.names)


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, or none if two labels share one."""
    return tuple(names) if len(set(names)) == len(names) else ()


def check_label_names(where: str, names: Sequence[str], num_labels: int) -> None:
    """Refuse names that do not tell the labels apart; no names at all is fine.

    Args:
        where: what has the names, for the message.
        names: of the labels, in order.
        num_labels: number of labels.

    Raises:
        ConfigError: their number is wrong, two are the same, or one is not text.
    """
    are_texts = not isinstance(names, str) and all(isinstance(name, str) for name in names)
    if names and not (are_texts and len(names) == num_labels == len(set(names))):
        raise ConfigError(
            f"{where} are {names if isinstance(names, str) else list(names)}, but must be "
            f"{num_labels} different names, one per label"
        )


def check_same_labels(where: str, judged: Sequence[str] | int | None, asked: Control) -> None:
    """Refuse a judge whose labels are numbered differently from the control's.

    Other names are fine: a model's "a photo of a hat" may be the control's "yes".

    Args:
        where: what has the judge, for the message.
        judged: names of its labels in order, or their number if they have no names; None if
            neither is known.
        asked: the control.

    Raises:
        ConfigError: a control that is a number, another number of labels, or the same names in
            another order.
    """
    if not isinstance(asked, Categorical):
        raise ConfigError(f"{where} tells labels apart, and its control is {asked.described()}")
    names = asked.names
    number = judged if isinstance(judged, int) or judged is None else len(judged)
    if number is not None and number != len(names):
        raise ConfigError(
            f"{where} tells {number} labels apart, and {len(names)} are asked for "
            f"({_listed(names)}); use a judge of the same labels"
        )
    if isinstance(judged, Sequence) and set(judged) == set(names) and list(judged) != list(names):
        raise ConfigError(
            f"the labels of {where} are {_listed(judged)}, and {_listed(names)} are asked for; use "
            "a judge with the same labels in the same order"
        )


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(number) for number in range(len(names))]


def _listed(names: Sequence[str]) -> str:
    if _are_numbers(names):
        return f"0 to {len(names) - 1}"
    more = f", … {len(names)} in all" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
