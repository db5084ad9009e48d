"""A soft classifier of mixture components in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError


class MixtureClassifier(nn.Module):
    """Which group of components a point belongs to, softened by a width s.

        p(y | x) = sum_{m in y} N(x; c_m, s^2 I) / sum_m N(x; c_m, s^2 I)

    With s the prior's own component width this is the exact posterior of the group; a larger s is
    a softer classifier.

    Args:
        means: [M, d] component means.
        groups: [M] label of each component, 0 .. L-1.
        std: width s, > 0.
    """

    means: Tensor
    membership: Tensor

    def __init__(
        self, *, means: Sequence[Sequence[float]], groups: Sequence[int], std: float
    ) -> None:
        super().__init__()
        if len(groups) != len(means):
            raise ConfigError(f"{len(groups)} groups for {len(means)} means; give one per mean")
        if not std > 0:
            raise ConfigError(f"the classifier's std={std} must be > 0")
        self.num_labels = max(groups) + 1
        if set(groups) != set(range(self.num_labels)):
            raise ConfigError(f"groups={list(groups)} must use every label 0 to {max(groups)}")
        self.std = float(std)
        self.register_buffer("means", torch.as_tensor(means, dtype=torch.float32))
        members = nn.functional.one_hot(torch.as_tensor(groups), self.num_labels).bool()
        self.register_buffer("membership", members)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, L] of points [B, d], in nats."""
        squared = (x[:, None, :] - self.means).square().sum(-1)  # [B, M]
        log_component = (-squared / (2 * self.std**2)).log_softmax(1)
        grouped = log_component[:, :, None].masked_fill(~self.membership, -torch.inf)
        return grouped.logsumexp(1)
