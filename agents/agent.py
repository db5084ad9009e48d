"""The contract of all agents: a rollout in, losses and metrics out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.kernels import TransitionKernel


class Chain(Protocol):
    """The chain of a rollout, for an agent's own computations; all calls are counted.

    Latents are [B, *S], steps [B] int64 and all alike, samples [B, *D], conditions by name [B].
    Gradients flow where autograd is on.

    Attributes:
        generator: the only source of randomness.
        conditions: all of the task's, each with a value by name; they cannot be enumerated where a
            control is a number.
    """

    generator: torch.Generator

    @property
    def kernel(self) -> TransitionKernel:
        """Tables of every step, such as `scale`, `signal` and `noise`, [K] each."""

    @property
    def conditions(self) -> Sequence[Mapping[str, float]]:
        """Every condition of the task."""

    def prior_loc(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The prior's mean of the next latent; at step K the read-out's clean latent."""

    def clean_estimate(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The prior's one-call estimate of the clean latent; at step K the read-out's."""

    def decode(self, latent: Tensor) -> Tensor:
        """The clean sample of a clean latent."""

    def reward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The reward under any conditions, times guidance strength: [B] nats."""

    def policy_loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """The present policy's mean of the next latent, given the prior's."""


class Phase(ABC):
    """A stretch of training: what its rollouts keep, and what is learned from them.

    Attributes:
        plan: what it asks of its rollouts.
    """

    plan: RolloutPlan

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add what is computed once per rollout, such as advantages, before the cut into batches.

        Args:
            rollout: [B, K], a whole one.
            chain: where it came from.

        Returns:
            The same, with the agent's keys added, [B, K, ...] each. They may have a graph where the
            plan does not cut the rollout into batches.
        """
        del chain
        return rollout

    @abstractmethod
    def loss(self, rollout: TensorDict) -> TensorDict:
        """Compute the losses of one rollout, or of the part that the plan asks for.

        Args:
            rollout: [B, K], see `ctrl_rl.keys`.

        Returns:
            Scalars. Keys `loss_*` are summed and differentiated, all others are logged.
        """


class Agent(nn.Module, Phase):
    """Turns rollouts into losses; knows nothing of env, trainer, optimizer, logger or device.

    An agent is the one phase of its training unless it names others.

    Attributes:
        needs_equal_conditions: whether it compares episodes of the same condition; there are none
            where a control is a number.
    """

    needs_equal_conditions = False

    def __init__(self) -> None:
        super().__init__()  # subclasses take only their own keyword arguments

    @property
    def phases(self) -> Mapping[float, Phase]:
        """Phases by the share of training, 0 to less than 1, at which each begins."""
        return {0.0: self}

    @property
    def needs_reward_gradient(self) -> bool:
        """Whether the reward must be differentiable.

        Pathwise gradients need it. An agent that differentiates the reward in `prepare` says so
        with `needs_reward_gradient = True`.
        """
        return any(phase.plan.gradients == "pathwise" for phase in self.phases.values())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The agent's trainable parameters, by the name of their learning rate."""
        return {"critic": [p for p in self.parameters() if p.requires_grad]}
