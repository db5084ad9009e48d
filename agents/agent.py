"""The contract of all agents: a rollout in, losses and figures out."""

from abc import ABC, abstractmethod

from tensordict import TensorDict
from torch import nn

from ctrl_rl.plans import RolloutPlan


class Agent(nn.Module, ABC):
    """Turns rollouts into losses; knows nothing of env, trainer, optimizer, logger or device.

    Attributes:
        in_keys: keys of the rollout that `loss` reads, checked once before the first update.
        plan: what it asks of its rollouts.
        needs_reward_gradient: whether the reward must be differentiable.
    """

    in_keys: tuple[str | tuple[str, ...], ...]
    plan: RolloutPlan
    needs_reward_gradient: bool

    @abstractmethod
    def loss(self, rollout: TensorDict) -> TensorDict:
        """Compute the losses of one rollout.

        Args:
            rollout: [B, K], see `ctrl_rl.keys`.

        Returns:
            Scalars. Keys `loss_*` are summed and differentiated, all others are logged.
        """
