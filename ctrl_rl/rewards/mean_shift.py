r"""A numeric control with a known exact answer: the mean of a coordinate.

    r(sample, y) = log N(u; y, s^2) - log N(u; m, s^2) = (y - m) / s^2 u - (y^2 - m^2) / (2 s^2),

u = direction . sample. Where u ~ N(m, s^2) under the prior, E[e^r] = 1 for every y, and the tilted
law is the prior moved until the mean of u is y.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ctrl_rl.controls import Continuous
from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards.reward import Reward


class MeanShift(Reward):
    """Log-ratio of two Gaussians of a coordinate, one around the number asked for.

    Differentiable; no upper bound, as it is linear in the sample.

    Args:
        direction: [d], of the coordinate; its length is divided out.
        mean: of the coordinate under the prior.
        std: its standard deviation there.
        low: smallest mean that can be asked for.
        high: largest.
        control: name of the control.

    Raises:
        ConfigError: no direction, a std that is not > 0, or no interval.
    """

    direction: Tensor

    def __init__(
        self,
        *,
        direction: Sequence[float],
        mean: float,
        std: float,
        low: float,
        high: float,
        control: str = "mean",
    ) -> None:
        super().__init__()
        vector = torch.as_tensor(direction, dtype=torch.float32)
        if vector.ndim != 1 or not vector.norm() > 0:
            raise ConfigError(f"direction={list(direction)} must be numbers, not all 0")
        if not 0 < std < math.inf:
            raise ConfigError(f"std={std} must be > 0")
        self.register_buffer("direction", vector / vector.norm())
        self.mean, self.std, self.control = float(mean), float(std), control
        self.controls = {control: Continuous(float(low), float(high))}
        self.differentiable = True
        self.upper_bound = None

    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Reward every sample; NaN asks for nothing and gives 0."""
        asked = control[self.control].nan_to_num(nan=self.mean)
        weight, constant = self.weight_and_constant(asked)
        return weight * self._coordinate(sample) + constant

    def weight_and_constant(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The reward of numbers [*N] as weight * u + constant, each [*N]."""
        weight = (asked - self.mean) / self.std**2
        return weight, -weight * (asked + self.mean) / 2

    def predict(self, sample: Tensor) -> dict[str, Tensor]:
        """The coordinate of every sample."""
        return {self.control: self._coordinate(sample)}

    def _coordinate(self, sample: Tensor) -> Tensor:
        return sample @ self.direction
