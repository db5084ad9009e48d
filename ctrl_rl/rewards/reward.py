"""What a reward is: log-evidence of the control in a clean sample.

The MDP multiplies it by the guidance strength. A reward with a known upper bound (log-probabilities
have 0) makes the gap certified; without one it is only estimated.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from ctrl_rl.conditions import all_names
from ctrl_rl.errors import ConfigError, check_choice

# Rewards computed in float32 may exceed their known bound by rounding.
_BOUND_TOLERANCE = 1e-5


def checked_weights(
    weights: Mapping[str, float] | None, names: Collection[str]
) -> dict[str, float]:
    """Weights of the parts of a sum by their names, 1 where none is given.

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


class Reward(nn.Module, ABC):
    """Base of all rewards.

    Attributes:
        controls: number of labels of each named control, without the null label.
        label_names: what the labels of each control are called; "0", "1" and so on where a reward
            does not set it.
        differentiable: whether gradients flow to the sample.
        upper_bound: nats that no reward exceeds, or None where that is not known.
        reads_prompts: whether it needs the prompt under "prompt" of its control; a prior without
            prompts is refused.
    """

    controls: dict[str, int]
    differentiable: bool
    upper_bound: float | None
    reads_prompts: bool = False
    _named: Mapping[str, Sequence[str]] = MappingProxyType({})

    @property
    def label_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the labels of every control, in their order, without the null label.

        Set it to the names that there are, by control; numbers are the names of the others.

        Raises:
            ConfigError: names that do not tell a control's labels apart.
        """
        return all_names(self.controls, self._named)

    @label_names.setter
    def label_names(self, names: Mapping[str, Sequence[str]]) -> None:
        self._named = dict(names)

    def train(self, mode: bool = True) -> "Reward":
        """Stay in evaluation mode: a reward is no part of what is trained."""
        return super().train(False)

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Be told the prior's prompts in the order of their places, where `reads_prompts`."""
        del prompts

    @abstractmethod
    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Reward every sample.

        Args:
            sample: [B, *D] float32.
            control: labels, each [B] int64; the null label (the last row) asks for nothing.

        Returns:
            [B] float32, nats.
        """

    def predict(self, sample: Tensor) -> dict[str, Tensor] | None:
        """Most probable label of every control, each [B] int64; None where one has none."""
        del sample
        return None
