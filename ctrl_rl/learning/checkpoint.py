"""What training saves, to resume or to load."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """All that is needed to resume as if never interrupted.

    Attributes:
        update: number of finished updates.
        policy: the policy's state dict.
        training: everything else that is a tensor: optimizer, average, agent, random states.
        counters: calls of `prior`, `policy` and `reward`, counted in samples, and `wall_s`.
    """

    update: int
    policy: dict[str, Tensor]
    training: dict[str, Tensor]
    counters: dict[str, Any]

    @property
    def cost(self) -> dict[str, Any]:
        """The cost of training, for summary.json."""
        return {
            "steps": self.update,
            "denoiser_calls": self.counters["prior"] + self.counters["policy"],
            "reward_calls": self.counters["reward"],
            "wall_s": round(self.counters["wall_s"], 1),
        }


# The cost without training.
NO_TRAINING = {"steps": 0, "denoiser_calls": 0, "reward_calls": 0, "wall_s": 0.0}
