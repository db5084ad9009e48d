"""Noise levels of a diffusers scheduler's config, which priors and kernels share.

A noisy latent at training timestep t is x = signal(t) clean + noise(t) e with e ~ N(0, I).
Diffusion models have signal^2 + noise^2 = 1, flow matching has signal + noise = 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels.accepted import FLOW
from ctrl_rl.kernels.settings import scheduler_settings
from ctrl_rl.networks.execution import FixedPrecision


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
    """The levels of a diffusers scheduler's config, by its `prediction_type`.

    Raises:
        ConfigError: a scheduler that is not read, see `scheduler_settings`, or betas without a
            noise law: the signal must fall at every timestep.
    """
    settings = scheduler_settings(scheduler_config)
    if settings.get("prediction_type") == FLOW:
        return FlowLevels(settings.get("num_train_timesteps", 1000))
    from diffusers import DDPMScheduler

    alpha_bar: Tensor = DDPMScheduler.from_config(settings).alphas_cumprod.float()
    falls = torch.cat([alpha_bar.new_ones(1), alpha_bar]).diff() < 0  # false for nan
    if not falls.all():
        raise ConfigError(
            f"the scheduler's betas have no noise law: the signal does not fall at timestep "
            f"{int((~falls).nonzero()[0])} of {len(alpha_bar)}; give smaller or fewer betas if it "
            "has reached 0, and larger ones if it is still 1"
        )
    return DiffusionLevels(alpha_bar)
