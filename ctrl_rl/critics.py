"""Networks that an agent owns: soft values of latents, and log Z of conditions.

Both start at zero: the value of every state under a reward that is not known yet.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.nets import ConditionedPerceptron
from ctrl_rl.plans import TaskSpec


class ValueNetwork(nn.Module):
    """A perceptron v(x, k, y) on flattened latents, in nats.

    Meant for latents of up to a few thousand numbers.

    Args:
        task: shape of latents, number of steps, controls.
        width: hidden width.
        depth: hidden layers.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(self, task: TaskSpec, *, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        for name, size in {"width": width, "depth": depth}.items():
            if size < 1:
                raise ConfigError(f"agent.critic.{name}={size} must be 1 or more")
        self.perceptron = ConditionedPerceptron(
            inputs=math.prod(task.shape),
            outputs=1,
            num_steps=task.num_steps,
            controls=task.controls,
            width=width,
            depth=depth,
        )

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Soft values.

        Args:
            x: [*N, *S] latents.
            step: [*N] int64, 0 .. K.
            control: labels by name, each [*N] int64.

        Returns:
            [*N] nats.
        """
        value: Tensor = self.perceptron(x.flatten(step.ndim), step, control)[..., 0]
        return value


class LogPartition(nn.Module):
    """log Z of every condition: one number for every combination of labels, null labels included.

    Args:
        task: its controls; their combinations should be few, as each is learned by itself.
    """

    def __init__(self, task: TaskSpec) -> None:
        super().__init__()
        self.sizes = {name: labels + 1 for name, labels in sorted(task.controls.items())}
        self.table = nn.Embedding(math.prod(self.sizes.values()), 1)
        nn.init.zeros_(self.table.weight)

    def forward(self, control: Mapping[str, Tensor]) -> Tensor:
        """Log Z of labels by name, each [B] int64: [B] nats."""
        index = torch.zeros((), dtype=torch.int64, device=self.table.weight.device)
        for name, size in self.sizes.items():
            index = index * size + control[name]
        log_z: Tensor = self.table(index)[..., 0]
        return log_z
