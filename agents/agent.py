"""The contract of all agents: a rollout in, losses and figures out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from tensordict import TensorDict
from torch import nn

from ctrl_rl.plans import RolloutPlan


class Agent(nn.Module, ABC):
    """Turns rollouts into losses; knows nothing of env, trainer, optimizer, logger or device.

    Attributes:
        in_keys: keys of rollouts that `prepare` and `loss` read, checked once before the first
            update; what `prepare` adds is not among them.
        plan: what it asks of its rollouts.
        needs_reward_gradient: whether the reward must be differentiable.
    """

    in_keys: tuple[str | tuple[str, ...], ...]
    plan: RolloutPlan
    needs_reward_gradient: bool

    def __init__(self) -> None:
        super().__init__()  # nothing but keyword arguments of the agent's own

    @property
    def plans(self) -> Mapping[float, RolloutPlan]:
        """Plans by the share of training, 0 to less than 1, at which each begins: `plan` at 0."""
        return {0.0: self.plan}

    def prepare(self, rollout: TensorDict) -> TensorDict:
        """Add what is computed once per rollout, such as advantages, before it is cut into batches.

        Args:
            rollout: [B, K], a whole one.

        Returns:
            The same, with keys of the agent's own; no graph is kept of them.
        """
        return rollout

    @abstractmethod
    def loss(self, rollout: TensorDict) -> TensorDict:
        """Compute the losses of one rollout, or of the part of it that the plan asks for.

        Args:
            rollout: [B, K], see `ctrl_rl.keys`.

        Returns:
            Scalars. Keys `loss_*` are summed and differentiated, all others are logged.
        """

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters of its own, by name of their learning rate."""
        return {"critic": [p for p in self.parameters() if p.requires_grad]}
