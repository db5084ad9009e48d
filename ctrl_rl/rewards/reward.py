"""The reward: log-evidence of the condition in a clean sample.

The MDP multiplies it by the guidance strength. A reward with a known upper bound (log-probabilities
have 0) makes the gap certified; without one the gap is only estimated.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ctrl_rl.controls import Control, as_control
from ctrl_rl.errors import ConfigError, check_choice

# Rewards computed in float32 may exceed their known bound by rounding.
_BOUND_TOLERANCE = 1e-5


def checked_weights(
    weights: Mapping[str, float] | None, names: Collection[str]
) -> dict[str, float]:
    """Weights of the parts of a sum by name, 1 by default.

    Raises:
        ConfigError: a name that no part has, or a weight that is not > 0 and finite.
    """
    given = dict(weights or {})
    for name, weight in given.items():
        check_choice("name in weights", name, names)
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"weights.{name}={weight} must be > 0")
    return {name: float(given.get(name, 1.0)) for name in names}


def check_reward_bound(reward: Tensor, name: str, upper_bound: float) -> None:
    """Refuse a bound that does not hold.

    Args:
        reward: shape [N], nats.
        name: argument name for the error message.
        upper_bound: claimed bound of the reward, nats.

    Raises:
        ValueError: `upper_bound` is not finite.
        ConfigError: a reward exceeds it beyond rounding.
    """
    if not math.isfinite(upper_bound):
        raise ValueError(f"the upper bound of {name} must be finite, got {upper_bound}")
    largest = float(reward.detach().max()) if len(reward) else -math.inf
    if largest > upper_bound + _BOUND_TOLERANCE:
        raise ConfigError(
            f"{name} reaches {largest:.6g} nats, above its stated upper bound {upper_bound:.6g}; "
            "state one that holds, or null, which makes the gap an estimate"
        )


def check_reward_values(reward: Tensor, count: int, name: str) -> None:
    """Refuse a result that is not one number in nats per sample.

    Args:
        reward: what a reward gave.
        count: number of samples, B.
        name: of the reward, for the message.

    Raises:
        ConfigError: it is not floating point of shape [B].
    """
    if not reward.is_floating_point() or reward.shape != (count,):
        raise ConfigError(
            f"{name} gave {reward.dtype} of shape {tuple(reward.shape)}, but must give floating "
            f"point of shape ({count},), nats per sample: sum over all other dimensions, and "
            "convert whole numbers with .float()"
        )


class Reward(nn.Module, ABC):
    """Base of all rewards.

    Attributes:
        controls: by name, without null values. Set each to a number of labels, their names,
            {"low": …, "high": …} for a number, or a `Control`.
        differentiable: whether gradients flow to the sample.
        upper_bound: upper bound in nats, or None if it is unknown.
        reads_prompts: whether it needs the prompt under "prompt" of its control; a prior without
            prompts is refused.
    """

    differentiable: bool
    upper_bound: float | None
    reads_prompts: bool = False
    _controls: Mapping[str, Control] = MappingProxyType({})

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Take `controls` of a class body as if the constructor had set them."""
        super().__init_subclass__(**arguments)
        given = cls.__dict__.get("controls")
        if given is not None and not isinstance(given, property):
            cls._controls = {k: as_control(value, f"controls.{k}") for k, value in given.items()}
            del cls.controls

    @property
    def controls(self) -> dict[str, Control]:
        """The controls by name.

        Raises:
            ConfigError: set to something that is not a control.
        """
        return dict(self._controls)

    @controls.setter
    def controls(self, given: Mapping[str, Any]) -> None:
        self._controls = {k: as_control(value, f"controls.{k}") for k, value in given.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse names of labels that nothing would read."""
        if name == "label_names":
            raise ConfigError(
                "a reward has no label_names; name the labels in controls, such as "
                "controls={'hat': ['no', 'yes']}"
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> "Reward":
        """Stay in evaluation mode: a reward is not trained."""
        return super().train(False)

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Take the prior's prompts in the order of their indices, if `reads_prompts`."""
        del prompts

    @abstractmethod
    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Reward every sample.

        Args:
            sample: [B, *D] float32.
            control: values, each [B], int64 for labels and float32 for numbers; the null value
                (the index after the last label, or NaN) asks for nothing.

        Returns:
            [B] float32, nats.
        """

    def predict(self, sample: Tensor) -> dict[str, Tensor] | None:
        """What samples show of every control; None if one of these is unknown.

        Most probable labels [B] int64, or numbers [B] float32.
        """
        del sample
        return None
