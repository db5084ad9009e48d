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
    """

    gradients: bool
    checkpointing: bool = False
    truncation: int | str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no truncation."""
        whole = isinstance(self.truncation, int) and self.truncation >= 1
        if not (self.truncation is None or self.truncation == "uniform" or whole):
            raise ConfigError(
                f"agent.truncation={self.truncation!r} is not a number of steps; "
                "use null for the whole chain, 1 or more, or uniform"
            )
