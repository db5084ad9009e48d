"""The parts of the soft return J = E[ r - sum_k KL_k ] of every episode of a rollout, in nats."""

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
