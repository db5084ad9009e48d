"""Flow matching with noise in every step."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError, one_line
from ctrl_rl.kernels.accepted import FLOW, SHIFT, UNIFORM
from ctrl_rl.kernels.kernel import TransitionKernel
from ctrl_rl.kernels.settings import scheduler_settings


def flow_sde_kernel(
    *, scheduler_config: Mapping[str, Any], num_steps: int, noise_level: float = 0.7
) -> TransitionKernel:
    """The stochastic form of a flow-matching sampler (Liu et al., "Flow-GRPO", 2025, eq. 9).

    Let the noise level s fall from 1 to 0, with d and e the network's clean latent and noise. The
    sampler dx = (e - d) ds of the pretrained model has the same marginals as

        dx = [(e - d) + g(s)^2 / (2 s) e] ds + g(s) dW,      g(s) = noise_level sqrt(s / (1 - s)).

    This kernel takes one Euler step of it per noise level of the scheduler. At s = 1, where g is
    infinite, g is taken at the next level, as in the paper's code. The last step, to s = 0, adds no
    noise and is the read-out.

    Args:
        scheduler_config: config of `FlowMatchEulerDiscreteScheduler`: its levels and shifts.
        num_steps: K, stochastic steps.
        noise_level: > 0, in units of the schedule; 0.7 is the paper's.

    Raises:
        ConfigError: the prior is not a flow-matching model, K or noise_level out of range.
    """
    settings = scheduler_settings(scheduler_config)
    if settings.get("prediction_type") != FLOW:
        raise ConfigError(
            "kernel=flow_sde needs a flow-matching prior, such as Stable Diffusion 3 or Flux; use "
            "kernel=ddim or ddpm for a diffusion model"
        )
    if not noise_level > 0:
        raise ConfigError(
            f"kernel.noise_level={noise_level} makes the steps deterministic, so actions have no "
            "density and no KL; use a number > 0"
        )
    if num_steps < 1:
        raise ConfigError(f"kernel.num_steps={num_steps} must be 1 or more")
    scheduler = flow_scheduler(settings)
    if settings.get("use_dynamic_shifting") and SHIFT not in settings:
        raise ConfigError(
            f"the scheduler's use_dynamic_shifting=true needs {SHIFT}, the shift for the size of "
            f"the samples; add {SHIFT} to its config, or set use_dynamic_shifting to false"
        )
    steps = num_steps + 1
    levels = torch.linspace(1, 1 / steps, steps).tolist() if settings.get(UNIFORM) else None
    scheduler.set_timesteps(steps, sigmas=levels, mu=settings.get(SHIFT))  # as its pipeline's call
    sigma = scheduler.sigmas.double()
    noise_weight, scale = flow_sde_tables(sigma, noise_level)
    return TransitionKernel(
        timesteps=scheduler.timesteps,
        signal=1 - sigma[:-1],
        noise=sigma[:-1],
        denoised_weight=1 - sigma[1:],
        sample_weight=torch.zeros_like(scale),
        noise_weight=noise_weight,
        scale=scale,
    )


def flow_sde_tables(sigma: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
    """Weights of the estimated noise, and standard deviations of the added noise, by step.

    Args:
        sigma: [S + 1] noise levels, falling to 0.
        noise_level: > 0.

    Returns:
        Two [S]; the mean of the next latent is the clean estimate times 1 - sigma[k + 1], plus e
        times the first.
    """
    before, after = sigma[:-1], sigma[1:]
    step = before - after
    rate = noise_level**2 * before / (1 - torch.where(before == 1, after, before))  # g^2
    noise_weight = after - step * rate / (2 * before)
    scale = (rate * step).sqrt()
    noise_weight[-1] = scale[-1] = 0.0
    return noise_weight, scale


def flow_scheduler(settings: Mapping[str, Any]) -> Any:
    """A `FlowMatchEulerDiscreteScheduler` from settings as `scheduler_settings` gives them.

    Raises:
        ConfigError: two spacings at once, or one for which a package is missing.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    try:
        return FlowMatchEulerDiscreteScheduler.from_config(flow_settings(settings))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the scheduler cannot be had: {one_line(error)}") from error


def flow_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that diffusers' flow scheduler knows; it warns about anything else."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    known = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    return {key: value for key, value in config.items() if key in known}
