"""The terms of the soft return J = E[ r - sum_k KL_k ] of every episode of a rollout, in nats."""

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys


def episode_reward(episode: TensorDict) -> Tensor:
    """Sum of rewards of every episode: [B] nats."""
    reward: Tensor = episode[keys.NEXT_REWARD].sum((1, 2))
    return reward


def episode_kl(episode: TensorDict) -> Tensor:
    """Sum of the closed-form KLs of every episode: [B] nats."""
    kl: Tensor = episode[keys.KL].sum(1)
    return kl


def episode_log_ratio(episode: TensorDict) -> Tensor:
    """Sum of the log-ratios of every episode: [B] nats."""
    log_ratio: Tensor = episode[keys.LOG_RATIO].sum(1)
    return log_ratio


def path_levels(episode: TensorDict, values: Tensor) -> Tensor:
    """Soft value minus the log-ratio so far, v_k(s_k) - sum_{j < k} log_ratio_j, with v_K = r.

    At the soft optimum log_ratio_k = v_{k+1} - v_k, so all levels of an episode are equal. The
    difference of levels i and j is how far the path from step i to step j is from that.

    Args:
        episode: [B, K], a whole one.
        values: [B, K] nats, soft values v_k of the latents x_k, k < K.

    Returns:
        [B, K + 1] nats, with the graphs of `values` and of the log-ratio.
    """
    levels = torch.cat([values, episode_reward(episode)[:, None]], 1)
    spent = torch.nn.functional.pad(episode[keys.LOG_RATIO].cumsum(1), (1, 0))
    return levels - spent


def mean_soft_return(episode: TensorDict) -> Tensor:
    """Batch mean of reward - KL with its graph, a scalar in nats; pathwise agents maximise it."""
    return (episode_reward(episode) - episode_kl(episode)).mean()
