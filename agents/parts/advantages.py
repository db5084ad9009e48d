r"""Soft returns to go, statistics per condition, and log-probability arithmetic shared by agents.

All of this is arithmetic on rollouts [B, T], without networks. An episode's soft return to go from
step k is

    G_k = reward - sum_{j >= k} KL_j        [nats]

with the closed-form KL: only the actions, not noise of the KL itself, add to its variance.
"""

import math

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.errors import ConfigError


def returns_to_go(rollout: TensorDict, penalty: str = keys.KL) -> Tensor:
    """Soft return from every step on, including the step's penalty.

    Args:
        rollout: [B, T] with `penalty` and rewards.
        penalty: key of the cost of every step, [B, T] nats.

    Returns:
        [B, T] nats, without a graph.
    """
    gains = (rollout[keys.NEXT_REWARD][..., 0] - rollout[penalty]).detach()
    return gains.flip(1).cumsum(1).flip(1)


def condition_index(rollout: TensorDict) -> Tensor:
    """Number the conditions of a rollout: [B] int64, equal where all values are equal."""
    values = _control_values(rollout)
    if not values:
        return torch.zeros(len(rollout), dtype=torch.int64, device=rollout[keys.STEP].device)
    return _row_index(values)


def _control_values(rollout: TensorDict) -> list[Tensor]:
    """Values [B] of every control, in the order of their names."""
    control = rollout[keys.CONTROL]
    return [control[name][:, 0] for name in sorted(control.keys())]


def _row_index(columns: list[Tensor]) -> Tensor:
    """Number the rows of columns [B] each: [B] int64, equal where all columns are equal."""
    _, index = torch.unique(torch.stack(columns, 1), dim=0, return_inverse=True)
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


def baseline(values: Tensor, rollout: TensorDict) -> Tensor:
    """Predict every episode's value from the other episodes; this leaves gradients unbiased.

    It is the mean of those with the same labels. Where a control is a number y, no two episodes
    have the same; a cubic in y, with a slope for every combination of labels, is then added to
    these means, fitted to the other episodes by ridge regression: its prediction for a left-out
    episode is v - (v - fit) / (1 - leverage), in one fit for all (Allen 1974, PRESS).

    Args:
        values: [B, ...].
        rollout: [B, T], for its conditions.

    Returns:
        [B, ...]; the mean of all others where a sample is alone with its labels.
    """
    controls = _control_values(rollout)
    numbers = [y for y in controls if y.is_floating_point()]
    if not numbers:
        return leave_one_out_mean(values, condition_index(rollout))
    # A number counts among the labels by whether it asks for anything.
    index = _row_index([y.isnan().long() if y.is_floating_point() else y for y in controls])
    # On the CPU: some accelerators (MPS) have no float64.
    index, flat = index.cpu(), values.reshape(len(values), -1).cpu().double()
    means = torch.nn.functional.one_hot(index).double()
    standard = [_standardised(number.cpu().double()) for number in numbers]
    powers = [z[:, None] ** torch.arange(1, 4) for z in standard]
    shapes = torch.cat([*powers, *(means * z[:, None] for z in standard)], 1)
    design = torch.cat([means, shapes], 1)
    # The means are free; the rest is penalised as by a prior of one standard deviation.
    penalty = torch.cat([means.new_full(means.shape[1:], 1e-9), shapes.new_ones(shapes.shape[1:])])
    gram = design.T @ design + penalty.diag()
    hat = design @ torch.linalg.solve(gram, design.T)
    leverage = hat.diagonal()[:, None]
    left_out = flat - (flat - hat @ flat) / (1 - leverage).clamp(min=1e-3)
    everyone = leave_one_out_mean(flat, torch.zeros_like(index))
    predicted = torch.where(leverage < 1 - 1e-3, left_out, everyone)
    return predicted.to(values).reshape(values.shape)


def _standardised(numbers: Tensor) -> Tensor:
    """Numbers [B] minus their mean, over their spread; NaN becomes 0."""
    known = numbers[~numbers.isnan()]
    if len(known) < 2:
        return torch.zeros_like(numbers)
    return ((numbers - known.mean()) / known.std().clamp(min=1e-12)).nan_to_num(nan=0.0)


def step_advantage(rollout: TensorDict) -> Tensor:
    """Return after an action beyond what the other episodes predict for its condition.

    Args:
        rollout: [B, T], a whole one.

    Returns:
        [B, T] nats: G_{k+1} at step k minus its `baseline`, without a graph.
    """
    following = returns_to_go(rollout) + rollout[keys.KL].detach()  # G_{k+1}
    return following - baseline(following, rollout)


def centred(advantage: Tensor, rollout: TensorDict) -> Tensor:
    """Advantages minus their `baseline`, step by step.

    A critic is never quite up to date: an error shared by all episodes, such as a policy's growing
    KL, would push the policy away from everything it did. Leaving one out keeps the gradient
    unbiased.

    Args:
        advantage: [B, T] nats over a critic's values.
        rollout: [B, T], a whole one.

    Returns:
        [B, T] nats.
    """
    return advantage - baseline(advantage, rollout)


def generalized_advantage(gains: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimate without discount (Schulman et al. 2016).

    A_k = sum_{l >= 0} gae_lambda^l (gain_{k+l} + V_{k+l+1} - V_{k+l}) with V = 0 after the last
    step. For gae_lambda = 1 it is the return to go minus V_k.

    Args:
        gains: [B, T] nats, the gain of every step.
        values: [B, T] nats, V of the state before every step.
        gae_lambda: 0 for one step of bootstrapping, 1 for none.

    Returns:
        [B, T] nats.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    surprises = gains + following - values
    advantages = [surprises[:, -1]]
    for surprise in surprises[:, :-1].flip(1).unbind(1):
        advantages.append(surprise + gae_lambda * advantages[-1])
    return torch.stack(advantages[::-1], dim=1)


def check_clip(clip: float) -> float:
    """Refuse a range of the ratio that is empty or reaches 0.

    Raises:
        ConfigError: not inside (0, 1).
    """
    if not 0 < clip < 1:
        raise ConfigError(f"agent.clip={clip} must be > 0 and < 1")
    return clip


def clipped_surrogate(
    rollout: TensorDict, advantage: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Clipped objective of every step; on policy its gradient is the policy gradient.

    With D dimensions and rho = (pi(a|s) / pi_behaviour(a|s))^(1/D), a ratio per dimension,

        D min( advantage rho, advantage clip(rho, 1 - clip, 1 + clip) ).

    A ratio of joint densities is e to the power of a sum over D dimensions: it overflows or
    vanishes for images after changes that are small in every dimension. The factor D undoes the
    1/D in d rho = rho d log pi / D: the gradient is advantage * rho * grad log pi, and at
    pi = pi_behaviour exactly advantage * grad log pi.

    Args:
        rollout: [B, T] with `loc` of the present policy.
        advantage: [B, T] nats.
        clip: how far rho may go from 1 and still gain, in (0, 1).

    Returns:
        The objective, [B, T], and figures to log: `clip_fraction`, the share of steps whose
        gradient is stopped, and `behaviour_kl`, KL(pi || pi_behaviour) of a step in nats.
    """
    loc, scale = rollout[keys.LOC], rollout[keys.SCALE]
    behaviour_loc = rollout[keys.BEHAVIOUR_LOC]
    dims = math.prod(loc.shape[scale.ndim :])
    log_ratio = gaussian.log_ratio(rollout[keys.ACTION], loc, behaviour_loc, scale)
    ratio = (log_ratio / dims).exp()
    free, clipped = advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)
    figures = {
        "clip_fraction": (clipped < free).float().mean(),
        "behaviour_kl": gaussian.kl(loc, behaviour_loc, scale).mean().detach(),
    }
    return dims * torch.minimum(free, clipped), figures
