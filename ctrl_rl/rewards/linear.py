"""A linear reward, whose soft-optimal policy is known in closed form under a Gaussian prior."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards.reward import Reward


class LinearReward(Reward):
    """r(sample, y) = weights[y] . sample, one weight vector per label; no upper bound.

    Args:
        weights: [L, d], nats per unit.
        control: name of the control.
    """

    weights: Tensor

    def __init__(self, *, weights: Sequence[Sequence[float]], control: str = "direction") -> None:
        super().__init__()
        table = torch.as_tensor(weights, dtype=torch.float32)
        if table.ndim != 2:
            raise ConfigError(f"weights must be [labels, dimensions], got {table.shape}")
        null = torch.zeros(1, table.shape[1])
        self.register_buffer("weights", torch.cat([table, null]))
        self.control = control
        self.controls = {control: table.shape[0]}
        self.differentiable = True
        self.upper_bound = None

    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Weigh every sample with its label's vector; the null label's is 0."""
        return (sample * self.weights[control[self.control]]).sum(-1)
