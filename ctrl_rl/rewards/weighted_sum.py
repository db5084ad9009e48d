"""Several rewards as one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ctrl_rl.controls import Control
from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards.reward import Reward, checked_weights


class WeightedSum(Reward):
    """r(sample, y) = sum_i w_i r_i(sample, y), in nats, with the controls of all r_i.

    Args:
        rewards: by names of your choice; no control in two of them.
        weights: by those names, > 0; 1 by default.

    Raises:
        ConfigError: no reward, a control in two of them, or a weight that does not fit.
    """

    def __init__(
        self, *, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        if not rewards:
            raise ConfigError("rewards is empty; give rewards by names of your own")
        controls: dict[str, Control] = {}
        for name, reward in rewards.items():
            twice = sorted(controls.keys() & reward.controls)
            if twice:
                raise ConfigError(
                    f"rewards.{name} has the control '{twice[0]}', as another reward of the "
                    "sum has; give it another name in one of them"
                )
            controls |= reward.controls
        self.controls = controls
        self.rewards = nn.ModuleDict(rewards)
        self.requires_grad_(False).eval()
        self.weights = checked_weights(weights, rewards)
        self.differentiable = all(reward.differentiable for reward in rewards.values())
        self.reads_prompts = any(reward.reads_prompts for reward in rewards.values())
        bounds = {name: reward.upper_bound for name, reward in rewards.items()}
        known = [self.weights[name] * b for name, b in bounds.items() if b is not None]
        self.upper_bound = sum(known) if len(known) == len(bounds) else None

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Pass the prompts to the rewards that read them."""
        for reward in self.rewards.values():
            if reward.reads_prompts:
                reward.read_prompts(prompts)  # type: ignore[operator]

    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Sum the weighted rewards."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            parts = [self.weights[name] * reward(sample, control) for name, reward in self._each()]
        total: Tensor = sum(parts[1:], parts[0])
        return total

    def predict(self, sample: Tensor) -> dict[str, Tensor] | None:
        """What samples show of all controls; None if a reward does not tell its own."""
        predicted = [reward.predict(sample) for _, reward in self._each()]
        known = {k: labels for each in predicted if each is not None for k, labels in each.items()}
        return known if known and known.keys() == self.controls.keys() else None

    def _each(self) -> list[tuple[str, Reward]]:
        return list(self.rewards.items())  # type: ignore[arg-type]
