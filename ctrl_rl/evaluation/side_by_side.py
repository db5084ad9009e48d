"""The same noise with and without control: samples of the pretrained model and of the policy.

Every strip starts at the same latents and gets the same noise at every step: its n-th sample is
another strip's n-th sample, before or after. Nothing here is measured: the figures of an evaluation
come from separate draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.controls import Values
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.policies import DenoisingPolicy

BEFORE = "before: the pretrained model"
MOST_CONDITIONS = 12  # shown
_SAMPLES = 8


@dataclass(frozen=True)
class Strip:
    """Episodes of one policy under one condition.

    Attributes:
        title: in plain words.
        latents: [n, K + 1, *S], from the noise x_0 to x_K.
        samples: [n, *D], the clean samples.
        paired: whether other strips of one n and seed have the same noise, sample by sample.
    """

    title: str
    latents: Tensor
    samples: Tensor
    paired: bool = True


@dataclass(frozen=True)
class Comparison:
    """The pretrained model's strip, and the policy's from the same noise, one per condition."""

    before: Strip
    after: tuple[Strip, ...]


def draw_strip(
    process: DenoisingProcess,
    policy: DenoisingPolicy,
    control: Mapping[str, Values],
    *,
    title: str,
    n: int = _SAMPLES,
    seed: int,
) -> Strip:
    """Roll out a policy; strips of the same n and seed have the same noise.

    Args:
        process: the MDP.
        policy: to roll out.
        control: values by name, for all n or each; without any the noise would be used differently.
        title: of the strip.
        n: number of episodes.
        seed: of the noise.
    """
    env = LatentEnv(process, num_envs=n, seed=seed, device=process.kernel.scale.device)
    with torch.no_grad():
        episodes = rollout(env, policy, control=control)
    latents = torch.cat([episodes[keys.X], episodes[keys.ACTION][:, -1:]], 1)
    return Strip(title=title, latents=latents, samples=episodes[keys.SAMPLE][:, -1])
