"""Conditions: by name, a value of every control, and a prompt if the prior has prompts.

A condition is all that an episode is asked for; see `ctrl_rl.controls` for its values.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.controls import Categorical, Control, Values
from ctrl_rl.errors import ConfigError, did_you_mean

Condition = dict[str, int | float]

_MORE = {keys.PROMPT: "; others can be added to prior.evaluation_prompts"}


class Conditions(Sequence[Condition]):
    """All conditions of a task, without null values; the last control varies fastest.

    Each is made on access, so a task may have any number of them.

    Args:
        controls: the task's controls by name; the prompt first if there are prompts.
        prompts: indices of the prompts that evaluations use; None for all.

    Attributes:
        controls: the same.
        size: number of conditions, infinity if a control is a number; Python's `len` fails above
            2^63.
    """

    def __init__(
        self, controls: Mapping[str, Control], prompts: Sequence[int] | None = None
    ) -> None:
        self.controls = dict(controls)
        self._prompts = prompts
        sizes = {name: control.size for name, control in controls.items()}
        if prompts is not None:
            sizes[keys.PROMPT] = len(prompts)
        self.size = math.prod(sizes.values())

    def __len__(self) -> int:
        if math.isinf(self.size):
            (name, *_) = [k for k, control in self.controls.items() if math.isinf(control.size)]
            raise ConfigError(
                f"the control {name} is a number, so there is no list of all conditions; draw some "
                "with Conditions.some"
            )
        return int(self.size)

    @overload
    def __getitem__(self, place: int) -> Condition: ...

    @overload
    def __getitem__(self, place: slice) -> list[Condition]: ...

    def __getitem__(self, place: int | slice) -> Condition | list[Condition]:
        """The condition at an index, or those of a slice; numbers have no indices."""
        number = self.__len__()
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(number))]
        if not -number <= place < number:
            raise IndexError(place)
        rest, digits = place % number, {}
        for name, control in reversed(self.controls.items()):
            values = self._values(name, control)
            rest, digit = divmod(rest, len(values))
            digits[name] = values[digit]
        return {name: digits[name] for name in self.controls}

    def some(self, most: int, seed: int) -> list[Condition]:
        """All conditions if there are at most `most`, else `most` random ones, in order.

        If a control is a number they come in random order, prompt by prompt.
        """
        if self.size <= most:
            return self[:]
        generator = random.Random(seed)
        if math.isinf(self.size):
            return self._random(most, generator)
        places: set[int] = set()
        while len(places) < most:  # random.sample cannot choose from more than 2^63
            places.add(generator.randrange(int(self.size)))
        return [self[place] for place in sorted(places)]

    def _random(self, n: int, generator: random.Random) -> list[Condition]:
        """At most n conditions in random order, but prompt by prompt."""
        drawn = {name: one.random_values(n, generator) for name, one in self.controls.items()}
        if self._prompts is not None:
            drawn[keys.PROMPT] = [generator.choice(self._prompts) for _ in range(n)]
        number = min(len(values) for values in drawn.values())
        conditions = [{name: values[i] for name, values in drawn.items()} for i in range(number)]
        return sorted(conditions, key=lambda condition: condition.get(keys.PROMPT, 0))

    def _values(self, name: str, control: Control) -> Sequence[int]:
        if name == keys.PROMPT and self._prompts is not None:
            return self._prompts
        return range(int(control.size))

    def name(self, condition: Mapping[str, float]) -> str:
        """A condition as a key, such as "digit=3", "prompt=cat, hat=no", "hat=any" or "(none)"."""
        shown = {name: self.controls[name].shown(value) for name, value in condition.items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items()) or "(none)"

    def title(self, condition: Mapping[str, float]) -> str:
        """A condition in plain words, such as "glasses, no hat", "cat, digit 3" or "anything".

        Null values are left out.
        """
        words = []
        for name, value in condition.items():
            control = self.controls[name]
            if not bool(control.is_null(torch.tensor(value))):
                is_prompt = name == keys.PROMPT
                words.append(control.shown(value) if is_prompt else control.title(name, value))
        return ", ".join(words) or "anything"


def joint_place(sizes: Mapping[str, int], values: Mapping[str, Tensor]) -> Tensor:
    """Index of labels among all combinations; the last control varies fastest.

    Args:
        sizes: number of labels of each control.
        values: by name, each [*N] int64 below its size; other names are ignored.

    Returns:
        [*N] int64; a single 0 if `sizes` is empty.
    """
    place = torch.zeros((), dtype=torch.int64)
    for name, size in sizes.items():
        place = place.to(values[name].device) * size + values[name]
    return place


def label_counts(controls: Mapping[str, Control]) -> dict[str, int]:
    """Number of labels of each control that has labels, by name."""
    return {k: control.size for k, control in controls.items() if isinstance(control, Categorical)}


def checked_values(
    given: Mapping[str, Values], controls: Mapping[str, Control], n: int, device: torch.device
) -> dict[str, Tensor]:
    """Values by control, each [n] on `device`, int64 for labels and float32 for numbers.

    Args:
        given: by control, one value for all or [n] values; a missing control asks for nothing.
        controls: the task's controls by name.
        n: number of episodes.
        device: of the result.

    Raises:
        ConfigError: an unknown control or value, or a number of values other than n.
    """
    for name in given:
        if name not in controls:
            raise ConfigError(f"unknown control '{name}'; {did_you_mean(name, controls)}")
    checked = {}
    for name, control in controls.items():
        hint = _MORE.get(name, "")
        values = control.read(name, given.get(name, control.null), device, hint)
        if values.shape not in ((), (n,)):
            kind = "label" if isinstance(control, Categorical) else "number"
            raise ConfigError(
                f"control {name} has shape {tuple(values.shape)}; give one {kind}, or {n} {kind}s"
            )
        checked[name] = values.expand(n).clone()
    return checked
