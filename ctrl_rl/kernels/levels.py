"""Noise levels of a diffusers scheduler's config, which priors and kernels share.

A noisy latent at training timestep t is x = signal(t) clean + noise(t) e with e ~ N(0, I).
Diffusion models have signal^2 + noise^2 = 1, flow matching has signal + noise = 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctrl_rl.networks.execution import FixedPrecision

FLOW = "flow_prediction"  # the prediction_type of a network that predicts e - clean
# Keys that a prior adds to a flow scheduler's config for what its pipeline's call passes: whether
# levels fall evenly from 1 to 1 / S, and the shift if it depends on the image's size.
UNIFORM, SHIFT = "uniform_sigmas", "mu"


class NoiseLevels(FixedPrecision, ABC):
    """Signal and noise at given training timesteps."""

    @abstractmethod
    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise [B] float32 at timesteps [B], whole or fractional."""


class DiffusionLevels(NoiseLevels):
    """The levels of a diffusion model; between whole timesteps noise / signal is linear.

    diffusers' Euler schedulers, which visit timesteps in between, interpolate it likewise.

    Args:
        alpha_bar: [T] squared signal at every training timestep.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, alpha_bar: Tensor) -> None:
        super().__init__()
        self.register_buffer("signal", alpha_bar.sqrt(), persistent=False)
        self.register_buffer("noise", (1 - alpha_bar).sqrt(), persistent=False)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Look up whole timesteps, interpolate others."""
        if not timestep.is_floating_point():
            return self.signal[timestep], self.noise[timestep]
        below = timestep.floor().long()
        above = timestep.ceil().long()
        ratio = torch.lerp(
            self.noise[below] / self.signal[below],
            self.noise[above] / self.signal[above],
            timestep - below,
        )
        between = (1 + ratio.square()).rsqrt()
        whole = below == above  # where the signal may be 0 and the ratio infinite
        return (
            torch.where(whole, self.signal[below], between),
            torch.where(whole, self.noise[below], ratio * between),
        )


class FlowLevels(NoiseLevels):
    """The straight path of flow matching (Lipman et al. 2023): noise t / T, signal 1 - t / T.

    Args:
        num_train_timesteps: T.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        super().__init__()
        self.num_train_timesteps = num_train_timesteps

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise [B] at timesteps [B]."""
        noise = timestep.float() / self.num_train_timesteps
        return 1 - noise, noise


def noise_levels(scheduler_config: Mapping[str, Any]) -> NoiseLevels:
    """The levels of a diffusers scheduler's config, by its `prediction_type`."""
    if scheduler_config.get("prediction_type") == FLOW:
        return FlowLevels(scheduler_config.get("num_train_timesteps", 1000))
    from diffusers import DDPMScheduler

    levels: Tensor = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
    return DiffusionLevels(levels.float())
