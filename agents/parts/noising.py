r"""The forward process as a source of latents: a rollout's clean sample with noise of every level.

For every step k of an episode that ended in the clean latent z, independently,

    x_k ~ N(signal_k z, noise_k^2 I),  action_k = mean of x_{k+1} given x_k and z,

the latter by the kernel's formula with z as the network's estimate. A policy whose loc is the mean
of action_k over all z that x_k may have come from denoises its own samples. A regression on these
latents needs only the end of an episode: an agent's `prepare` puts them in place of those the
episode went through.
"""

import torch
from tensordict import TensorDict, stack

from ctrl_rl import keys
from ctrl_rl.agents.agent import Chain


@torch.no_grad()
def noisy_copies(chain: Chain, episodes: TensorDict) -> TensorDict:
    """A latent of the forward process for every step of every episode.

    Args:
        chain: where the episodes came from; prior and policy are called.
        episodes: [B, K] of a rollout.

    Returns:
        [B, K] with `x`, `action`, `prior_loc` and, of the policy, `behaviour_loc`, all constants.
    """
    kernel, generator, clean = chain.kernel, chain.generator, episodes[keys.CLEAN][:, -1]
    copies = []
    for state in episodes.select(keys.STEP, keys.CONTROL).unbind(1):
        step, control = state[keys.STEP], dict(state[keys.CONTROL].items())
        noise = torch.randn(clean.shape, generator=generator, device=generator.device)
        x = kernel.signal[step[0]] * clean + kernel.noise[step[0]] * noise
        prior_loc = chain.prior_loc(x, step, control)
        entries = {
            keys.X: x,
            keys.ACTION: kernel.mean(x, clean, step),
            keys.PRIOR_LOC: prior_loc,
            keys.BEHAVIOUR_LOC: chain.policy_loc(x, step, control, prior_loc),
        }
        copies.append(TensorDict(entries, batch_size=len(x)))
    return stack(copies, 1)
