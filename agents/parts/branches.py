r"""One policy step repeated with a graph, off a rollout that has none.

From a latent x at step k the policy takes its step, and from where it leads the prior estimates the
clean sample in one call:

    a ~ pi(. | x, k, y),   branch_reward = r(clean_estimate(a, k + 1), y),   branch_kl = KL_k(x).

The gradient passes through that estimate, the step and the policy; x is a constant. At k = K - 1
the estimate is the chain's read-out; before that it stands for the remaining steps. The rollout
itself stays the policy's, and its reward and KL are those of whole episodes.

A loss on some last steps puts no price on the others' drift, and a network shared by all steps then
drifts there. The anchor is that price at one of those steps j, drawn uniformly:

    anchor_kl = (number of those steps) KL_j(x_j),     in the mean the sum of their KLs,

with x_j a constant: it costs one policy call, for any K.
"""

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.agent import Chain

_REWARD, _KL, _ANCHOR = "branch_reward", "branch_kl", "anchor_kl"  # [B, K] nats


def branch_late(chain: Chain, episodes: TensorDict, last: int) -> TensorDict:
    """Add the branch of one step, drawn uniformly from the last ones.

    Args:
        chain: where the episodes came from; prior, policy and reward are called.
        episodes: [B, K] of a rollout.
        last: how many of the last steps k is drawn from.

    Returns:
        The same with reward and KL of the branch [B, K] in nats with their graph, 0 but at step k.
    """
    num_steps = episodes.batch_size[1]
    late, generator = min(last, num_steps), chain.generator
    drawn = torch.randint(late, (1,), generator=generator, device=generator.device)
    k = num_steps - 1 - int(drawn)
    return _branch(chain, episodes, k, episodes[keys.X][:, k], copies=1)


def branch_renoised(chain: Chain, episodes: TensorDict, copies: int) -> TensorDict:
    """Add the branch of the last step, from several noisy copies of the clean latent.

    Args:
        chain: where the episodes came from; prior, policy and reward are called.
        episodes: [B, K] of a rollout.
        copies: how many latents are drawn per episode from the forward process,
            N(signal_k clean, noise_k^2 I) with k = K - 1; results are averaged.

    Returns:
        The same with reward and KL of the branch [B, K] in nats with their graph, 0 but at step k.
    """
    k, generator = episodes.batch_size[1] - 1, chain.generator
    repeated = episodes[keys.CLEAN][:, k].repeat_interleave(copies, 0)
    noise = torch.randn(repeated.shape, generator=generator, device=generator.device)
    x = chain.kernel.signal[k] * repeated + chain.kernel.noise[k] * noise
    return _branch(chain, episodes, k, x, copies)


def _branch(chain: Chain, episodes: TensorDict, k: int, x: Tensor, copies: int) -> TensorDict:
    """Add the branch of step k from latents x [B * copies, *S], constants."""
    num_episodes, num_steps = episodes.batch_size
    x = x.detach()
    step = episodes[keys.STEP][:, k].repeat_interleave(copies, 0)
    labels = episodes[keys.CONTROL][:, k].items()
    control = {name: label.repeat_interleave(copies, 0) for name, label in labels}
    with torch.no_grad():
        prior_loc = chain.prior_loc(x, step, control)
    with torch.enable_grad():
        loc = chain.policy_loc(x, step, control, prior_loc)
        scale = chain.kernel.scale[step]
        action = gaussian.draw(loc, scale, chain.generator)
        sample = chain.decode(chain.clean_estimate(action, step + 1, control))
        here = torch.arange(num_steps, device=x.device) == k
        per_copy = (chain.reward(sample, control), gaussian.kl(loc, prior_loc, scale))
        reward, kl = (
            each.unflatten(0, (num_episodes, copies)).mean(1)[:, None] * here for each in per_copy
        )
    return episodes.copy().set(_REWARD, reward).set(_KL, kl)


def mean_branch_return(episodes: TensorDict) -> Tensor:
    """Batch mean of the branch's reward - KL with its graph, nats."""
    return (episodes[_REWARD] - episodes[_KL]).sum(1).mean()


def anchor(chain: Chain, episodes: TensorDict, last: int) -> TensorDict:
    """Add the KL of the steps before the last ones, from one of them.

    Args:
        chain: where the episodes came from; the policy is called.
        episodes: [B, K] of a rollout.
        last: how many of the last steps are left out.

    Returns:
        The same with `anchor_kl` [B, K] in nats with its graph, 0 except at that step; 0
        everywhere if no step is left.
    """
    num_episodes, num_steps = episodes.batch_size
    generator, earlier = chain.generator, num_steps - min(last, num_steps)
    device = generator.device
    if earlier == 0:
        return episodes.copy().set(_ANCHOR, torch.zeros(num_episodes, num_steps, device=device))
    j = int(torch.randint(earlier, (1,), generator=generator, device=device))
    state = episodes[:, j].detach()
    prior_loc, control = state[keys.PRIOR_LOC], dict(state[keys.CONTROL].items())
    with torch.enable_grad():
        loc = chain.policy_loc(state[keys.X], state[keys.STEP], control, prior_loc)
        kl = gaussian.kl(loc, prior_loc, state[keys.SCALE])
        anchor_kl = earlier * kl[:, None] * (torch.arange(num_steps, device=device) == j)
    return episodes.copy().set(_ANCHOR, anchor_kl)


def mean_anchor_kl(episodes: TensorDict) -> Tensor:
    """Batch mean of the KL that `anchor` added, with its graph, nats."""
    return episodes[_ANCHOR].sum(1).mean()
