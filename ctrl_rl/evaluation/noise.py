"""Noise of samples: every one has a stream of its own, whatever else is drawn with it.

A run's 6th sample at a seed is the same one among 6 as among 600, up to rounding: networks round
differently in batches of another size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generators(seed: int, n: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """The generators of samples 0 .. n - 1 at a seed.

    Diffusers' pipelines take such a list: a `ControlledPipeline` then draws a run's samples.

    Args:
        seed: 0 or more.
        n: number of samples.
        device: where the noise is drawn; it has other numbers on another kind of device.
    """
    made = []
    for place in range(n):
        # Hashed: as seed + place, the second sample of a seed would be the first one of the next.
        (state,) = np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)
        made.append(torch.Generator(device=device).manual_seed(int(state)))
    return made


def draw(shape: Sequence[int], streams: Sequence[torch.Generator]) -> Tensor:
    """One standard normal draw from each stream: [n, *shape] float32."""
    drawn = [torch.randn(*shape, generator=each, device=each.device) for each in streams]
    return torch.stack(drawn)
