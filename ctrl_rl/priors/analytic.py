"""Priors whose denoiser is known in closed form: the tests' ground truth, and tasks to train on.

For data drawn from a mixture of isotropic Gaussians with weights w_m, means c_m and a shared
standard deviation s, the noisy latent x = a z + b e (a the signal, b the noise) is also a
mixture, with means a c_m and variance v = a^2 s^2 + b^2, and the clean estimate is

    E[z | x] = sum_m p(m | x) (c_m + s^2 a / v * (x - a c_m)).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels.levels import noise_levels
from ctrl_rl.priors.prior import Denoiser, Prior


class MixtureDenoiser(Denoiser):
    """Exact posterior mean under a mixture of isotropic Gaussians.

    Args:
        means: [M, d] component means.
        std: shared standard deviation of the components.
        scheduler_config: gives signal and noise of every training timestep.
    """

    means: Tensor

    def __init__(
        self, *, means: Sequence[Sequence[float]], std: float, scheduler_config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.std = float(std)
        self.register_buffer("means", torch.as_tensor(means, dtype=torch.float32))
        self.levels = noise_levels(scheduler_config)

    def denoise(
        self, x: Tensor, timestep: Tensor, embedding: Tensor | None, prompt: Tensor | None
    ) -> Tensor:
        """Closed form; the embedding is not used, a policy adds its own correction."""
        del embedding, prompt
        signal, noise = (level[:, None, None] for level in self.levels(timestep))  # [B, 1, 1]
        variance = (signal * self.std).square() + noise.square()
        residual = x[:, None, :] - signal * self.means  # [B, M, d]
        responsibility = (-residual.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        component = self.means + self.std**2 * signal / variance * residual
        return (responsibility * component).sum(1)


class GaussianDenoiser(MixtureDenoiser):
    """Exact posterior mean under one Gaussian N(mean, std^2 I): affine in x."""

    def __init__(
        self, *, mean: Sequence[float], std: float, scheduler_config: Mapping[str, Any]
    ) -> None:
        super().__init__(means=[list(mean)], std=std, scheduler_config=scheduler_config)


def gaussian_prior(*, mean: Sequence[float], std: float, scheduler: Mapping[str, Any]) -> Prior:
    """A Gaussian N(mean, std^2 I) with its exact denoiser.

    Args:
        mean: [d].
        std: standard deviation, > 0.
        scheduler: a diffusers scheduler's config.
    """
    _check_std(std)
    denoiser = GaussianDenoiser(mean=mean, std=std, scheduler_config=scheduler)
    return Prior(denoiser, scheduler, shape=(len(mean),))


def mixture_prior(
    *, means: Sequence[Sequence[float]], std: float, scheduler: Mapping[str, Any]
) -> Prior:
    """An even mixture of Gaussians N(means[m], std^2 I) with its exact denoiser.

    Args:
        means: [M, d].
        std: shared standard deviation, > 0.
        scheduler: a diffusers scheduler's config.
    """
    _check_std(std)
    denoiser = MixtureDenoiser(means=means, std=std, scheduler_config=scheduler)
    return Prior(denoiser, scheduler, shape=(len(means[0]),))


def _check_std(std: float) -> None:
    if not std > 0:
        raise ConfigError(f"prior.std={std} must be > 0")
