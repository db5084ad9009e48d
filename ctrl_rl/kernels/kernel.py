r"""One denoising step as a Gaussian whose mean is linear in three tables.

Every sampler in the project takes a latent x and the network's estimate d of the clean
sample, and moves to a Gaussian with mean

    mean = denoised_weight[k] * clip(d) + sample_weight[k] * x + noise_weight[k] * e,
    e = (x - signal[k] d) / noise[k]

and standard deviation scale[k]. DDPM (Ho, Jain, Abbeel 2020, eq. 7) has noise_weight 0, DDIM (Song,
Meng, Ermon 2021, eq. 12) has sample_weight 0. The tables hold no network: one kernel serves the
prior, every policy and every test.

Steps 0 .. K-1 are stochastic: they are the actions of the MDP. A last step with scale 0 is not an
action but the read-out, index K; it belongs to the environment.
"""

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError
from ctrl_rl.gaussian import expand_to
from ctrl_rl.networks.execution import FixedPrecision


class TransitionKernel(FixedPrecision):
    """Tables of Gaussian transitions, always float32, on the module's device.

    Args:
        timesteps: [S] the scheduler's training timesteps, noisiest first: int64, or float32 if the
            network is called between them.
        signal: [S] of the latent before each step, see `ctrl_rl.kernels.levels`.
        noise: [S] of the same.
        denoised_weight: [S], see the module's equation.
        sample_weight: [S], see the module's equation.
        noise_weight: [S], see the module's equation.
        scale: [S] standard deviations; a single trailing 0 marks the read-out.
        clip: applied to the clean estimate, see `Clip`; None for no clip.

    Raises:
        ConfigError: a step before the last one has no noise, or there is no stochastic step.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    denoised_weight: Tensor
    sample_weight: Tensor
    noise_weight: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        timesteps: Tensor,
        signal: Tensor,
        noise: Tensor,
        denoised_weight: Tensor,
        sample_weight: Tensor,
        noise_weight: Tensor,
        scale: Tensor,
        clip: "Clip | None" = None,
    ) -> None:
        super().__init__()
        self.has_read_out = bool(scale[-1] == 0)
        self.num_steps = len(timesteps) - int(self.has_read_out)
        if self.num_steps < 1:
            raise ConfigError(
                "the kernel has no stochastic step; use kernel.num_steps of 1 or more"
            )
        silent = (~(scale[: self.num_steps] > 0)).nonzero().flatten().tolist()
        if silent:
            raise ConfigError(
                f"the kernel adds no noise at step(s) {silent}, so actions there have no density; "
                "use DDIM with kernel.eta > 0 or DDPM"
            )
        self.clip = clip
        self.register_buffer(
            "timesteps", timesteps.float() if timesteps.is_floating_point() else timesteps.long()
        )
        for name, table in {
            "signal": signal,
            "noise": noise,
            "denoised_weight": denoised_weight,
            "sample_weight": sample_weight,
            "noise_weight": noise_weight,
            "scale": scale,
        }.items():
            self.register_buffer(name, table.float())

    def mean(self, x: Tensor, denoised: Tensor, step: Tensor) -> Tensor:
        """Mean of the next latent.

        Args:
            x: [B, *S] current latent.
            denoised: [B, *S] the network's estimate of the clean sample, not clipped.
            step: [B] int64, 0 .. K-1, or K for the read-out.

        Returns:
            [B, *S] float32.
        """
        x, denoised = x.float(), denoised.float()
        residual = x - expand_to(self.signal[step], x) * denoised
        noise_weight = self.noise_weight[step] / self.noise[step]
        clean = denoised if self.clip is None else self.clip(denoised)
        return (
            expand_to(self.denoised_weight[step], x) * clean
            + expand_to(self.sample_weight[step], x) * x
            + expand_to(noise_weight, x) * residual
        )

    def denoised(self, x: Tensor, mean: Tensor, step: Tensor) -> Tensor:
        """The clean estimate [B, *S] behind a mean: `mean` inverted, for steps 0 .. K-1.

        If the kernel clips, it is the one that would lead to that mean without a clip.
        """
        residual_weight = self.noise_weight[step] / self.noise[step]
        clean_weight = self.denoised_weight[step] - residual_weight * self.signal[step]
        latent_weight = self.sample_weight[step] + residual_weight
        return (mean - expand_to(latent_weight, x) * x) / expand_to(clean_weight, x)

    def moments(self, x: Tensor, denoised: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, *S] and standard deviation [B] > 0 of the next latent, for steps 0 .. K-1."""
        return self.mean(x, denoised, step), self.scale[step]


class Clip:
    """How a diffusers scheduler clips the clean estimate before it steps.

    Static clipping to [-bound, bound], or dynamic thresholding (Saharia et al. 2022, sec. 2.3): the
    bound is a quantile of |d| per sample, kept in [1, max_value], and the result is divided by it.
    Both have zero gradient where they are active, which affects pathwise agents.

    Args:
        bound: static clipping range.
        quantile: None for static clipping, else the quantile of dynamic thresholding.
        max_value: largest bound of dynamic thresholding.
    """

    def __init__(self, *, bound: float, quantile: float | None = None, max_value: float = 1.0):
        self.bound, self.quantile, self.max_value = bound, quantile, max_value

    def __call__(self, denoised: Tensor) -> Tensor:
        """Clip `denoised` [B, *S]; same shape."""
        if self.quantile is None:
            return denoised.clamp(-self.bound, self.bound)
        bound = torch.quantile(denoised.abs().flatten(1), self.quantile, dim=1)
        bound = expand_to(bound.clamp(1, self.max_value), denoised)
        return torch.clamp(denoised, -bound, bound) / bound
