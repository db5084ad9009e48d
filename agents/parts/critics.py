"""Networks that an agent owns: soft values of latents, their gradients, log Z of conditions.

All start at zero, values at the first return seen (`OffsetByFirstReturn`).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.agents.parts.returns import mean_soft_return
from ctrl_rl.agents.plan import TaskSpec
from ctrl_rl.conditions import joint_place, label_counts
from ctrl_rl.controls import Control
from ctrl_rl.errors import ConfigError, check_sizes
from ctrl_rl.networks.convolutional import StepwiseEncoder
from ctrl_rl.networks.embeddings import table_of
from ctrl_rl.networks.perceptrons import ConditionedPerceptron

# A table of 256 kB. In 1,000 updates of 64 episodes each of this many conditions is met about once.
_MOST_CONDITIONS = 65_536


def _perceptron(
    task: TaskSpec,
    outputs: int,
    width: int,
    depth: int,
    controls: Mapping[str, Control] | None = None,
) -> ConditionedPerceptron:
    """A perceptron on the task's flattened latents; it reads all controls unless told which."""
    check_sizes("agent.critic", width=width, depth=depth)
    return ConditionedPerceptron(
        inputs=math.prod(task.shape),
        outputs=outputs,
        num_steps=task.num_steps,
        controls=task.controls if controls is None else controls,
        width=width,
        depth=depth,
    )


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
        self.perceptron = _perceptron(task, 1, width, depth)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Soft values.

        Args:
            x: [*N, *S] latents.
            step: [*N] int64, 0 .. K.
            control: values by name, each [*N].

        Returns:
            [*N] nats.
        """
        value: Tensor = self.perceptron(x.flatten(step.ndim), step, control)[..., 0]
        return value


class GradientNetwork(nn.Module):
    """A perceptron g(x, k, y) on flattened latents, in nats per unit of the latent.

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
        self.perceptron = _perceptron(task, math.prod(task.shape), width, depth)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Gradients [*N, *S] at latents [*N, *S], steps [*N] in 0 .. K, values [*N] each."""
        return self.perceptron(x.flatten(step.ndim), step, control).reshape(x.shape)


class ConditionValues(nn.Module):
    """Numbers for all conditions at once at a latent of the prior: 1 + C, 0 at the start.

    A convolutional network where latents are images [C, H, W], a perceptron otherwise.

    Args:
        task: shape of latents, number of steps, controls.
        channels: of the convolutions, a multiple of 4.
        width: hidden width of the perceptron, and of the layer behind the convolutions.
        depth: hidden layers of the perceptron, or residual blocks.

    Raises:
        ConfigError: a size out of range, or too many conditions.
    """

    def __init__(
        self, task: TaskSpec, *, channels: int = 16, width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        outputs = 1 + _few(task.controls, "the soft values of all at once", nulls=0)
        self.image = len(task.shape) == 3
        if self.image:
            check_sizes("agent.critic", width=width, depth=depth)
            if channels < 4 or channels % 4:
                raise ConfigError(f"agent.critic.channels={channels} must be a multiple of 4")
            self.network: nn.Module = StepwiseEncoder(
                shape=task.shape,
                outputs=outputs,
                num_steps=task.num_steps,
                channels=channels,
                width=width,
                depth=depth,
            )
        else:
            self.network = _perceptron(task, outputs, width, depth, controls={})

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """Numbers [*N, 1 + C] at latents [*N, *S] and steps [*N] in 0 .. K."""
        if not self.image:
            outputs: Tensor = self.network(x.flatten(step.ndim), step, {})
            return outputs
        outputs = self.network(x.flatten(0, step.ndim - 1), step.flatten())
        return outputs.unflatten(0, step.shape)


class FirstReturn(nn.Module):
    """c, the mean soft return of the first episodes, in nats; 0 until there are any."""

    value: Tensor
    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(0.0))
        self.register_buffer("known", torch.tensor(False))

    def start_from(self, rollout: TensorDict) -> None:
        """Take c from a rollout [B, K], whole episodes, unless it is known."""
        if not self.known:
            self.value.copy_(mean_soft_return(rollout).detach())
            self.known.fill_(True)


class OffsetByFirstReturn(FirstReturn):
    """Values c + network(...).

    Rewards may lie anywhere; log-probabilities of rare labels average far below 0. A value that
    starts at 0 then finds every episode worse than expected. Until it has learned the one number
    that they share, the policy flees everything it has done.

    Args:
        network: gives values in nats, near 0 at the start.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *given: Any) -> Tensor:
        """The network's values plus c."""
        values: Tensor = self.network(*given)
        return self.value + values


def _few(controls: Mapping[str, Control], learned: str, *, nulls: int) -> int:
    """The number of combinations; too many to be met often enough are refused.

    Args:
        controls: whose values are combined.
        learned: what the agent learns for each, for the message.
        nulls: 1 to count null values too, 0 not to.
    """
    number = math.prod(control.size + nulls for control in controls.values())
    if number > _MOST_CONDITIONS:
        many = "infinitely many" if math.isinf(number) else f"{number:,}"
        raise ConfigError(
            f"this agent learns {learned}, and the task has {many} conditions; at most "
            f"{_MOST_CONDITIONS:,} are few enough. Use agent=ctrl, ppo or another one"
        )
    return int(number)


class LogPartition(nn.Module):
    """log Z of every condition: one number for every combination of labels, null labels included.

    Where a control is a number, log Z is a function of it for every combination of labels; for
    several such controls it is a sum of one function each.

    Args:
        task: its controls.

    Raises:
        ConfigError: too many combinations to learn each separately.
    """

    def __init__(self, task: TaskSpec) -> None:
        super().__init__()
        counts = label_counts(task.controls)
        self.sizes = {name: labels + 1 for name, labels in sorted(counts.items())}
        labels = {name: task.controls[name] for name in self.sizes}
        numbers = {name: one for name, one in task.controls.items() if name not in labels}
        combinations = _few(labels, "one log Z for each", nulls=1)
        self.table = nn.Embedding(combinations, 1)
        nn.init.zeros_(self.table.weight)
        self.functions = nn.ModuleDict(
            {name: table_of(one, 1, combinations) for name, one in numbers.items()}
        )

    def forward(self, control: Mapping[str, Tensor]) -> Tensor:
        """Log Z of values by name, each [B]: [B] nats."""
        place = joint_place(self.sizes, control).to(self.table.weight.device)
        log_z: Tensor = self.table(place)
        for name, function in self.functions.items():
            value = control[name]
            log_z = log_z + function(value, place.expand(value.shape))
        return log_z[..., 0]


def state_values(critic: nn.Module, rollout: TensorDict) -> Tensor:
    """Values of a critic v(x, k, y) at the latents x_k of a rollout [B, T]: [B, T] nats."""
    control = dict(rollout[keys.CONTROL].items())
    values: Tensor = critic(rollout[keys.X], rollout[keys.STEP], control)
    return values


def value_regression(
    critic: nn.Module, rollout: TensorDict, target: Tensor, num_steps: int
) -> dict[str, Tensor]:
    """Least squares of a critic on targets, for an agent to return along with its loss.

    Args:
        critic: v(x, k, y).
        rollout: [B, T], a whole one or a piece along time.
        target: [B, T] nats, without a graph.
        num_steps: K; the mean is over all K steps, so the losses of pieces add up.

    Returns:
        `loss_critic`, half the mean squared error in nats squared, and `explained_variance`, the
        share of the targets' variance that the values explain: 1 at best, 0 for a constant.
    """
    values = state_values(critic, rollout)
    unexplained = (target - values.detach()).var() / target.var().clamp(min=1e-12)
    return {
        "loss_critic": (values - target).square().sum(1).mean() / (2 * num_steps),
        "explained_variance": 1 - unexplained,
    }
