"""Rewards under every condition at once: one episode says something about each of them.

What an episode of the prior would have been worth under a condition does not depend on which one it
was drawn for, so that it teaches the soft values of all of them,

    v_k(x, y) = log E_ref[ e^{r(sample, y)} | x_k = x ].
"""

import torch
from torch import Tensor

from ctrl_rl.envs.process import DenoisingProcess


@torch.no_grad()
def condition_rewards(process: DenoisingProcess, sample: Tensor) -> Tensor:
    """Rewards of clean samples under every condition, in one call of the reward.

    Args:
        process: the MDP; its calls of the reward are counted.
        sample: [B, *D].

    Returns:
        [B, C] nats, conditions in the process's order, without a graph.
    """
    conditions = process.conditions
    control = {
        name: torch.tensor([c[name] for c in conditions], device=sample.device).repeat(len(sample))
        for name in process.controls
    }
    copies = sample.repeat_interleave(len(conditions), 0)
    return process.reward(copies, control).reshape(len(sample), len(conditions))
