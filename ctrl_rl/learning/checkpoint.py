"""What training hands over, to go on from or to load."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on as if never interrupted.

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
        """What training took, for summary.json."""
        return {
            "steps": self.update,
            "denoiser_calls": self.counters["prior"] + self.counters["policy"],
            "reward_calls": self.counters["reward"],
            "wall_s": round(self.counters["wall_s"], 1),
        }


# What training took where there was none.
NO_TRAINING = {"steps": 0, "denoiser_calls": 0, "reward_calls": 0, "wall_s": 0.0}
