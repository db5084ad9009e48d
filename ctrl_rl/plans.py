"""What an agent asks of the trainer, as data, so that the trainer has no special cases."""

from dataclasses import dataclass

from ctrl_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What an agent asks of its rollouts, as data.

    Attributes:
        gradients: keep the graph from the policy's parameters through the chain to the reward.
        checkpointing: recompute activations in the backward pass: memory falls from all of a
            network's activations per step to one latent per step, for one more forward pass.
        truncation: gradients flow through the last `truncation` steps only, the earlier ones are
            sampled without a graph; None for the whole chain, "uniform" for a length drawn
            uniformly from 1 .. K per rollout.
        max_adjoint_norm: the adjoint dJ/dx_k of every sample and step is clipped to this Euclidean
            norm (nats per unit of x) on its way back; None for no clipping.
    """

    gradients: bool
    checkpointing: bool = False
    truncation: int | str | None = None
    max_adjoint_norm: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no truncation or no norm."""
        whole = isinstance(self.truncation, int) and self.truncation >= 1
        if not (self.truncation is None or self.truncation == "uniform" or whole):
            raise ConfigError(
                f"agent.truncation={self.truncation!r} is not a number of steps; "
                "use null for the whole chain, 1 or more, or uniform"
            )
        if self.max_adjoint_norm is not None and not self.max_adjoint_norm > 0:
            raise ConfigError(
                f"agent.max_adjoint_norm={self.max_adjoint_norm} must be > 0, or null for none"
            )
