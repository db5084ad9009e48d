r"""Soft returns to go, statistics per control, and log-probability arithmetic that agents share.

All of this is arithmetic on rollouts [B, T]; nothing here knows a network. An episode's soft return
to go from step k is

    G_k = reward - sum_{j >= k} KL_j        [nats]

with the closed-form KL, so that only the actions and not the KL's own noise reach its variance.
"""

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys


def returns_to_go(rollout: TensorDict, penalty: str = keys.KL) -> Tensor:
    """Soft return from every step on, its own penalty included.

    Args:
        rollout: [B, T] with `penalty` and rewards.
        penalty: key of what every step costs, [B, T] nats.

    Returns:
        [B, T] nats, without a graph.
    """
    gains = (rollout[keys.NEXT_REWARD][..., 0] - rollout[penalty]).detach()
    return gains.flip(1).cumsum(1).flip(1)


def condition_index(rollout: TensorDict) -> Tensor:
    """Number the conditions of a rollout: [B] int64, equal where all controls are equal."""
    labels = [rollout[keys.CONTROL, name][:, 0] for name in sorted(rollout[keys.CONTROL].keys())]
    if not labels:
        return torch.zeros(len(rollout), dtype=torch.int64, device=rollout[keys.STEP].device)
    _, index = torch.unique(torch.stack(labels, 1), dim=0, return_inverse=True)
    return index


def group_mean(values: Tensor, index: Tensor) -> Tensor:
    """Mean of every sample's own group: [B, ...] for values [B, ...] and groups [B]."""
    groups = int(index.max()) + 1
    total = values.new_zeros(groups, *values.shape[1:]).index_add_(0, index, values)
    count = torch.bincount(index, minlength=groups).to(values)
    return (total / count.reshape(-1, *[1] * (values.ndim - 1)))[index]


def leave_one_out_mean(values: Tensor, index: Tensor) -> Tensor:
    """Mean of the others of every sample's group: a baseline that leaves gradients unbiased.

    Args:
        values: [B, ...].
        index: [B] int64, the group of every sample.

    Returns:
        [B, ...]; the mean of all others where a sample is alone in its group.
    """
    count = torch.bincount(index)[index].to(values).reshape(-1, *[1] * (values.ndim - 1))
    others = (group_mean(values, index) * count - values) / (count - 1).clamp(min=1)
    everyone = (values.mean(0) * len(values) - values) / max(len(values) - 1, 1)
    return torch.where(count > 1, others, everyone)


def group_std(values: Tensor, index: Tensor) -> Tensor:
    """Standard deviation of every sample's own group, [B, ...]; 0 for a group of one."""
    return group_mean((values - group_mean(values, index)).square(), index).sqrt()
