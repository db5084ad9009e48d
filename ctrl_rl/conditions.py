"""What an episode is asked for: a prompt where the prior has any, and a label of every control.

A condition gives each of them a value by name: its place among the names, or the place behind the
last one, the null value, which asks for nothing and is called "any".
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.errors import ConfigError, did_you_mean

Label = int | str  # a place among the labels, or the name of one
Labels = Label | Sequence[Label] | Tensor  # one for all episodes, or one for each

ANY = "any"  # the null label's name, unless a label has it
_MOST_SHOWN = 12  # names in a list
_MORE = {keys.PROMPT: "; others can be added to prior.evaluation_prompts"}


class Conditions(Sequence[dict[str, int]]):
    """All that a task can be asked for, null values left out, with the last value running fastest.

    None is made before it is asked for, so that a task may have any number of them.

    Args:
        names: of all values by what they are values of, the prompt's first where there are prompts.
        prompts: places of the prompts that evaluations go through; None for all.

    Attributes:
        names: the same.
        sizes: their numbers.
        size: how many conditions there are; `len` of more than 2^63 is an error of Python's.
    """

    def __init__(
        self, names: Mapping[str, Sequence[str]], prompts: Sequence[int] | None = None
    ) -> None:
        self.names = {name: tuple(called) for name, called in names.items()}
        self.sizes = {name: len(called) for name, called in self.names.items()}
        self._values: dict[str, Sequence[int]] = {k: range(n) for k, n in self.sizes.items()}
        if prompts is not None:
            self._values[keys.PROMPT] = prompts
        self.size = math.prod(len(values) for values in self._values.values())

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, place: int) -> dict[str, int]: ...

    @overload
    def __getitem__(self, place: slice) -> list[dict[str, int]]: ...

    def __getitem__(self, place: int | slice) -> dict[str, int] | list[dict[str, int]]:
        """The condition at a place, or those of a slice."""
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(self.size))]
        if not -self.size <= place < self.size:
            raise IndexError(place)
        rest, found = place % self.size, {}
        for name, values in reversed(self._values.items()):
            rest, digit = divmod(rest, len(values))
            found[name] = values[digit]
        return {name: found[name] for name in self._values}

    def some(self, most: int, seed: int) -> list[dict[str, int]]:
        """All of them, or where there are more than `most`, so many drawn at random, in order."""
        if self.size <= most:
            return self[:]
        generator = random.Random(seed)
        drawn: set[int] = set()
        while len(drawn) < most:  # random.sample takes no more than 2^63 to choose from
            drawn.add(generator.randrange(self.size))
        return [self[place] for place in sorted(drawn)]

    def name(self, condition: Mapping[str, int]) -> str:
        """Key of a condition, such as "digit=3", "prompt=cat, hat=no", "hat=any" or "(none)"."""
        shown = {name: shown_name(y, self.names[name]) for name, y in condition.items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items()) or "(none)"

    def title(self, condition: Mapping[str, int]) -> str:
        """A condition in plain words, such as "glasses, no hat", "cat, digit 3" or "anything".

        Null values are left out.
        """
        words = []
        for name, place in condition.items():
            names, control = self.names[name], name.replace("_", " ")
            if place == len(names):
                continue
            if names == ("no", "yes"):
                words.append(("no " if place == 0 else "") + control)
            else:
                words.append(names[place] if name == keys.PROMPT else f"{control} {names[place]}")
        return ", ".join(words) or "anything"


def joint_place(sizes: Mapping[str, int], values: Mapping[str, Tensor]) -> Tensor:
    """Place of values among all combinations, the last one's running fastest.

    Args:
        sizes: how many values each has.
        values: by name, each [*N] int64 below its size; others are not looked at.

    Returns:
        [*N] int64; a single 0 where `sizes` is empty.
    """
    place = torch.zeros((), dtype=torch.int64)
    for name, size in sizes.items():
        place = place.to(values[name].device) * size + values[name]
    return place


def checked_labels(
    given: Mapping[str, Labels],
    names: Mapping[str, Sequence[str]],
    n: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Labels by control, each [n] int64 on a device.

    Args:
        given: by control a label for all or [n] labels, each its place, its name, or its place as
            text; what is missing gets its null label, which is called "any" too.
        names: of all labels by control, without the null label behind them; see `all_names`.
        n: number of episodes.
        device: of the result.

    Raises:
        ConfigError: a control or a label that does not exist, or another number of labels than n.
    """
    for name in given:
        if name not in names:
            raise ConfigError(f"unknown control '{name}'; {did_you_mean(name, names)}")
    checked = {}
    for name, called in names.items():
        size = len(called)
        label = torch.as_tensor(_places(given.get(name, size), name, called), device=device)
        if label.is_floating_point() or ((label < 0) | (label > size)).any():
            known = "" if _are_numbers(called) else f" ({_listed(called)})"
            raise ConfigError(
                f"control {name}={label.tolist()} is out of range; use whole labels 0 to "
                f"{size - 1}{known}, or {size} for the null label"
            )
        if label.shape not in ((), (n,)):
            raise ConfigError(
                f"control {name} has shape {tuple(label.shape)}; give one label, or {n} labels"
            )
        checked[name] = label.long().expand(n).clone()
    return checked


def all_names(
    sizes: Mapping[str, int], known: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Names of all labels by control: the known ones, and numbers, "0" on, for the others.

    Args:
        sizes: how many labels there are of each control, without the null label.
        known: names of the labels of some controls, in their order; none at all is as unknown.

    Raises:
        ConfigError: names that do not tell the labels apart, or of a control that does not exist.
    """
    for name, called in known.items():
        if name not in sizes:
            raise ConfigError(
                f"label_names has the unknown control '{name}'; {did_you_mean(name, sizes)}"
            )
        check_label_names(f"label_names.{name}", called, sizes[name])
    return {name: tuple(known.get(name) or map(str, range(size))) for name, size in sizes.items()}


def shown_name(place: int, names: Sequence[str]) -> str:
    """The name of the label at a place, or of the null label behind the last one."""
    if place < len(names):
        return names[place]
    return str(place) if ANY in names else ANY


def described(names: Mapping[str, Sequence[str]]) -> str:
    """Controls with what their labels are called, such as "glasses (no, yes), digit (0 to 9)"."""
    return ", ".join(f"{name} ({_listed(called)})" for name, called in names.items())


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, or none at all where two labels are called the same."""
    return tuple(names) if len(set(names)) == len(names) else ()


def check_label_names(where: str, names: Sequence[str], num_labels: int) -> None:
    """Refuse names that do not tell the labels apart; none at all is fine.

    Args:
        where: what has the names, for the message.
        names: of the labels, in their order.
        num_labels: how many labels there are.

    Raises:
        ConfigError: their number is wrong, two are the same, or one is no text.
    """
    are_texts = not isinstance(names, str) and all(isinstance(name, str) for name in names)
    if names and not (are_texts and len(names) == num_labels == len(set(names))):
        raise ConfigError(
            f"{where} are {names if isinstance(names, str) else list(names)}, but must be "
            f"{num_labels} different names, one per label"
        )


def check_same_labels(where: str, judged: Sequence[str] | int | None, asked: Sequence[str]) -> None:
    """Refuse a judge that numbers the labels in another way than they are asked for.

    Labels that are called otherwise are fine: a model's "a photo of a hat" may be what is asked for
    as "yes".

    Args:
        where: what brings the judge, for the message.
        judged: names of its labels in their order, or their number where they have no names; None
            where neither is known.
        asked: names of the labels that are asked for, "0" on where they have none.

    Raises:
        ConfigError: another number of labels, or the same names in another order.
    """
    number = judged if isinstance(judged, int) or judged is None else len(judged)
    if number is not None and number != len(asked):
        raise ConfigError(
            f"{where} tells {number} labels apart, and {len(asked)} are asked for "
            f"({_listed(asked)}); use a judge of the same labels"
        )
    if isinstance(judged, Sequence) and set(judged) == set(asked) and list(judged) != list(asked):
        raise ConfigError(
            f"the labels of {where} are {_listed(judged)}, and {_listed(asked)} are asked for; use "
            "a judge with the same labels in the same order"
        )


def _places(given: Any, control: str, names: Sequence[str]) -> Any:
    """The same with places for names, in lists too; anything else as it is."""
    if isinstance(given, str):
        return _place(given, control, names)
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if isinstance(given, Sequence):
        return [_places(each, control, names) for each in given]
    return given


def _place(text: str, control: str, names: Sequence[str]) -> int:
    if text in names:
        return names.index(text)
    if text == ANY:
        return len(names)
    try:
        return int(text)
    except ValueError:
        hint = did_you_mean(text, [*names, ANY]) + _MORE.get(control, "")
        raise ConfigError(f"unknown label '{text}' of control {control}; {hint}") from None


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(number) for number in range(len(names))]


def _listed(names: Sequence[str]) -> str:
    if _are_numbers(names):
        return f"0 to {len(names) - 1}"
    more = f", … {len(names)} in all" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
