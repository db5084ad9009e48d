r"""The forward process as a source of latents: a rollout's clean sample with noise of every level.

For every step k of an episode that ended in the clean latent z, independently,

    x_k ~ N(signal_k z, noise_k^2 I),  action_k = mean of x_{k+1} given x_k and z,

the latter by the kernel's own formula with z for the network's estimate. A policy whose loc is the
mean of action_k over all z that x_k may have come from denoises its own samples. A regression on
these latents needs of an episode only where it ended: an agent's `prepare` puts them in the place
of those that the episode went through.
"""

import torch
from tensordict import TensorDict, stack
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.policies import DenoisingPolicy


@torch.no_grad()
def noisy_copies(
    process: DenoisingProcess,
    policy: DenoisingPolicy,
    episodes: TensorDict,
    clean: Tensor,
    generator: torch.Generator,
) -> TensorDict:
    """A latent of the forward process for every step of every episode.

    Args:
        process: the MDP; its calls of the prior are counted.
        policy: the policy that is to be improved; its calls are counted.
        episodes: [B, K] of a rollout.
        clean: [B, *S] the clean latents that the episodes ended in.
        generator: draws the noise.

    Returns:
        [B, K] with `x`, `action`, `prior_loc` and, of `policy`, `behaviour_loc`, all constants.
    """
    kernel, found = process.kernel, []
    for state in episodes.select(keys.STEP, keys.CONTROL).unbind(1):
        step, control = state[keys.STEP], dict(state[keys.CONTROL].items())
        noise = torch.randn(clean.shape, generator=generator, device=generator.device)
        x = kernel.signal[step[0]] * clean + kernel.noise[step[0]] * noise
        prior_loc = process.prior_loc(x, step, control)
        policy.calls += len(x)
        copies = {
            keys.X: x,
            keys.ACTION: kernel.mean(x, clean, step),
            keys.PRIOR_LOC: prior_loc,
            keys.BEHAVIOUR_LOC: policy.loc(x, step, control, prior_loc),
        }
        found.append(TensorDict(copies, batch_size=len(x)))
    return stack(found, 1)
