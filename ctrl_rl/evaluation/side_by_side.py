"""The same noise with and without control: samples of the pretrained model and of the policy.

Every strip starts at the same latents and gets the same noise at every step: its n-th sample is
another strip's n-th sample, before or after, however many each has. Nothing here is measured: the
figures of an evaluation come from separate draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ctrl_rl.controls import Values
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.evaluation.noise import draw, generators
from ctrl_rl.evaluation.show import as_png
from ctrl_rl.gaussian import expand_to
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
        paired: whether other strips of the same seed have the same noise, sample by sample.
    """

    title: str
    latents: Tensor
    samples: Tensor
    paired: bool = True

    def __repr__(self) -> str:
        n, *shape = self.samples.shape
        return f"{n} samples of shape {tuple(shape)}: {self.title}"

    def _repr_png_(self) -> bytes:
        """For notebooks: the samples."""
        from ctrl_rl.evaluation.pictures import draw_strips

        return as_png(partial(draw_strips, strips=[replace(self, title="")], title=self.title))


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
    """Draw from a policy; strips of the same seed have the same noise.

    Args:
        process: the MDP.
        policy: to draw from.
        control: values by name, for all n or each; a missing one asks for nothing.
        title: of the strip.
        n: number of samples.
        seed: of the noise.
    """
    streams = generators(seed, n, process.kernel.scale.device)
    values = process.check_control(control, n)
    latents, samples = denoise(process, policy, values, streams)
    return Strip(title=title, latents=latents, samples=samples)


@torch.no_grad()
def denoise(
    process: DenoisingProcess,
    policy: DenoisingPolicy,
    control: Mapping[str, Tensor],
    streams: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Go through the chain once, with nothing but what a sample needs: no reward, no density.

    Args:
        process: the MDP.
        policy: gives the mean of every step.
        control: values by name, each [n].
        streams: of the noise, one for each of n samples.

    Returns:
        Latents x_0 .. x_K, [n, K + 1, *S], and clean samples [n, *D].
    """
    kernel, x = process.kernel, draw(process.shape, streams)
    latents = [x]
    for k in range(kernel.num_steps):
        step = torch.full((len(x),), k, device=x.device)
        loc = policy.loc(x, step, control, process.prior_loc(x, step, control))
        x = loc.float() + expand_to(kernel.scale[step], loc) * draw(process.shape, streams)
        latents.append(x)
    last = torch.full((len(x),), kernel.num_steps, device=x.device)
    samples = process.prior.decode(process.prior_loc(x, last, control))
    return torch.stack(latents, 1), samples
