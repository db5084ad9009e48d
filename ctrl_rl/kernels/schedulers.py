"""Kernels read off diffusers schedulers: the same betas, spacing, clipping and variances.

The scheduler object only gives its timesteps and signal levels and is then dropped. Its `step` is
written here as weights, and the tests compare the two. Two things differ where diffusers' own are
off: `ddim_kernel` says one; the other is a timestep of -1 that diffusers has at the end of some
`trailing` ones, such as 61 of 1000, where an even spacing is rounded to one timestep more.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError, did_you_mean
from ctrl_rl.kernels.accepted import FLOW
from ctrl_rl.kernels.kernel import Clip, TransitionKernel
from ctrl_rl.kernels.settings import scheduler_settings

Tables = dict[str, Any]  # arguments of `TransitionKernel`
# diffusers clamps DDPM variances from below at 1e-20; a step left with that is the read-out.
_DETERMINISTIC_VARIANCE = 1e-16


def ddpm_kernel(
    *,
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    final_noise: bool = False,
    timesteps: Sequence[int] | None = None,
) -> TransitionKernel:
    """Ancestral sampling of DDPM (Ho, Jain, Abbeel 2020, eqs. 6 and 7).

    Args:
        scheduler_config: config of a diffusers scheduler; all its betas, spacings, prediction
            types, clipping and the variance types `fixed_small`, `fixed_small_log`, `fixed_large`.
        num_steps: K, stochastic steps.
        final_noise: whether the last step draws noise if its variance is not 0. Algorithm 2 of the
            paper does not: the last step is then the read-out. diffusers does unless the step
            starts at timestep 0, which matters for `fixed_large` with spacings other than
            `leading`.
        timesteps: the scheduler's training timesteps to visit, noisiest first: K, and one more for
            the read-out if there is one. None takes the scheduler's own spacing.

    Raises:
        ConfigError: K out of range, timesteps that do not fit, or a learned or unknown variance.
    """
    from diffusers import DDPMScheduler

    def tables(scheduler: Any) -> Tables:
        timesteps = scheduler.timesteps.long()
        signal = scheduler.alphas_cumprod.double()
        before = signal[timesteps]
        after = torch.cat([signal[timesteps[1:]], torch.ones(1, dtype=torch.float64)])
        beta = 1 - before / after
        posterior = (1 - after) / (1 - before) * beta
        variance = beta if scheduler.config.variance_type == "fixed_large" else posterior
        noisy = (timesteps > 0) & (variance > _DETERMINISTIC_VARIANCE)
        noisy[-1] &= final_noise
        return {
            "timesteps": timesteps,
            **_levels(before),
            "denoised_weight": after.sqrt() * beta / (1 - before),
            "sample_weight": (1 - beta).sqrt() * (1 - after) / (1 - before),
            "noise_weight": torch.zeros_like(before),
            "scale": torch.where(noisy, variance, 0.0).sqrt(),
            "clip": _clip(scheduler.config),
        }

    variance_type = scheduler_settings(scheduler_config).get("variance_type", "fixed_small")
    accepted = ("fixed_small", "fixed_small_log", "fixed_large")
    if variance_type not in accepted:
        raise ConfigError(
            f"scheduler variance_type {variance_type!r} is none of the fixed variances; "
            f"{did_you_mean(variance_type, accepted)}"
        )
    if timesteps is None:
        return _with_steps(DDPMScheduler, scheduler_config, num_steps, tables)
    scheduler = _scheduler(DDPMScheduler, scheduler_config)
    visited = _check_timesteps(timesteps, scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(timesteps=visited)
    _check_first(scheduler)
    kernel = TransitionKernel(**tables(scheduler))
    if kernel.num_steps != num_steps:
        raise ConfigError(
            f"kernel.timesteps has {len(visited)} entries, which make {kernel.num_steps} "
            f"stochastic steps, but kernel.num_steps={num_steps}; change one of the two, or use "
            "kernel.timesteps=null for the scheduler's own spacing"
        )
    return kernel


def ddim_kernel(
    *, scheduler_config: Mapping[str, Any], num_steps: int, eta: float = 1.0
) -> TransitionKernel:
    """Stochastic DDIM (Song, Meng, Ermon 2021, eqs. 12 and 16).

    A step leads to the next timestep that is visited, and the last one to the end of the chain. In
    diffusers' scheduler it leads T // S timesteps down, with T training timesteps and S steps. That
    is the same where timesteps are T // S apart, as with `leading` spacing (and an offset below
    T // S), and with `trailing` if S divides T. Elsewhere diffusers' next step takes the latent for
    noisier or cleaner than it is: with `linspace` and five steps, a Gaussian of mean 0.5 comes out
    at 0.46.

    Args:
        scheduler_config: config of a diffusers scheduler; all its betas, spacings, prediction
            types and clipping.
        num_steps: K, stochastic steps.
        eta: noise level, > 0; 1 has DDPM's posterior variance, 0 would have no density.

    Raises:
        ConfigError: K or eta out of range.
    """
    from diffusers import DDIMScheduler

    if not eta > 0:
        raise ConfigError(
            f"kernel.eta={eta} makes DDIM deterministic, so actions have no density and no KL; "
            "use 0 < kernel.eta <= 1"
        )

    def tables(scheduler: Any) -> Tables:
        timesteps = scheduler.timesteps.long()
        signal = scheduler.alphas_cumprod.double()
        before, final = signal[timesteps], scheduler.final_alpha_cumprod.double()
        after = torch.cat([before[1:], final[None]])
        return _implicit(timesteps, before, after, eta=eta, clip=_clip(scheduler.config))

    return _with_steps(DDIMScheduler, scheduler_config, num_steps, tables)


def euler_ancestral_kernel(
    *, scheduler_config: Mapping[str, Any], num_steps: int
) -> TransitionKernel:
    """Ancestral sampling with Euler steps (Karras et al. 2022, alg. 2 without its correction).

    In this project's units, where latents keep their variance, a step is that of DDIM with eta = 1.
    It differs in its timesteps, which may lie between whole ones, and its end, a read-out.

    Args:
        scheduler_config: config of a diffusers scheduler; all its betas, spacings and prediction
            types.
        num_steps: K, stochastic steps.

    Raises:
        ConfigError: K out of range.
    """
    from diffusers import EulerAncestralDiscreteScheduler

    def tables(scheduler: Any) -> Tables:
        signal = 1 / (1 + scheduler.sigmas.double().square())
        return _implicit(scheduler.timesteps, signal[:-1], signal[1:], eta=1.0, clip=None)

    return _with_steps(EulerAncestralDiscreteScheduler, scheduler_config, num_steps, tables)


def _implicit(
    timesteps: Tensor, before: Tensor, after: Tensor, *, eta: float, clip: Clip | None
) -> Tables:
    """Steps from one level alpha_bar [S] to another, towards the clean estimate."""
    variance = eta**2 * (1 - after) / (1 - before) * (1 - before / after)
    direction = 1 - after - variance
    if (direction < -1e-9).any():
        raise ConfigError(f"kernel.eta={eta} asks for more noise than a step has; use <= 1")
    return {
        "timesteps": timesteps,
        **_levels(before),
        "denoised_weight": after.sqrt(),
        "sample_weight": torch.zeros_like(before),
        "noise_weight": direction.clamp(min=0).sqrt(),
        "scale": variance.clamp(min=0).sqrt(),
        "clip": clip,
    }


def _levels(alpha_bar: Tensor) -> dict[str, Tensor]:
    """Signal and noise, from float32 as in the priors."""
    level = alpha_bar.float()
    return {"signal": level.sqrt(), "noise": (1 - level).sqrt()}


def trim(scheduler: Any) -> None:
    """Drop the timestep -1 that rounding puts at the end of some `trailing` spacings."""
    kept = scheduler.timesteps >= 0
    scheduler.timesteps = scheduler.timesteps[kept]
    if hasattr(scheduler, "sigmas"):
        before, last = scheduler.sigmas[:-1], scheduler.sigmas[-1:]
        scheduler.sigmas = torch.cat([before[kept.to(before.device)], last])


def _scheduler(kind: Any, config: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers with the settings of any other's config."""
    settings = scheduler_settings(config)
    if settings.get("prediction_type") == FLOW:
        raise ConfigError(
            "the prior is a flow-matching model, whose latents this kernel does not know; use "
            "kernel=flow_sde"
        )
    return kind.from_config(settings)


def _with_steps(
    kind: Any, config: Mapping[str, Any], num_steps: int, tables: Callable[[Any], Tables]
) -> TransitionKernel:
    """The kernel with as many inference steps as leave `num_steps` stochastic ones."""
    scheduler = _scheduler(kind, config)
    limit = scheduler.config.num_train_timesteps - 1
    if not 1 <= num_steps <= limit:
        raise ConfigError(
            f"kernel.num_steps={num_steps} is not a number of stochastic denoising steps; "
            f"use 1 to {limit}"
        )
    found = _found(scheduler, num_steps, tables)
    if found:
        return TransitionKernel(**found)
    fewer, more = range(num_steps - 1, 0, -1), range(num_steps + 1, limit + 1)
    near = [next((n for n in each if _found(scheduler, n, tables)), None) for each in (fewer, more)]
    fix = " or ".join(f"{n}" for n in near if n) or "prior.scheduler={steps_offset:0}"
    raise ConfigError(
        f"kernel.num_steps={num_steps} cannot be had: with "
        f"{scheduler.config.timestep_spacing} spacing and "
        f"steps_offset={scheduler.config.steps_offset} this scheduler would start beyond its "
        f"{limit + 1} timesteps; use {fix}"
    )


def _found(scheduler: Any, num_steps: int, tables: Callable[[Any], Tables]) -> Tables | None:
    """Tables with so many stochastic steps, or None where the scheduler has none."""
    for steps in (num_steps + 1, num_steps):  # with a read-out, or where the last step has noise
        scheduler.set_timesteps(steps)
        trim(scheduler)
        if scheduler.timesteps[0] >= scheduler.config.num_train_timesteps:
            continue
        _check_first(scheduler)
        found = tables(scheduler)
        if len(found["scale"]) - int(found["scale"][-1] == 0) == num_steps:
            return found
    return None


def _check_first(scheduler: Any) -> None:
    """Refuse a first step from pure noise where the network predicts just that noise."""
    first, last = int(scheduler.timesteps[0]), scheduler.config.num_train_timesteps - 1
    silent = scheduler.config.rescale_betas_zero_snr and first == last
    if silent and scheduler.config.prediction_type == "epsilon":
        raise ConfigError(
            "the scheduler has rescale_betas_zero_snr with epsilon prediction, which divides "
            "by zero at the first step; use v_prediction or sample prediction"
        )


def _check_timesteps(timesteps: Sequence[int], available: int) -> list[int]:
    given = list(timesteps)
    whole = all(isinstance(t, int) and 0 <= t < available for t in given)
    if not given or not whole or any(a <= b for a, b in pairwise(given)):
        raise ConfigError(
            f"kernel.timesteps={given} must fall strictly from at most {available - 1} to at least "
            "0, in whole numbers: the scheduler's training timesteps, noisiest first"
        )
    return given


def _clip(config: Any) -> Clip | None:
    if config.thresholding:
        return Clip(
            bound=config.clip_sample_range,
            quantile=config.dynamic_thresholding_ratio,
            max_value=config.sample_max_value,
        )
    return Clip(bound=config.clip_sample_range) if config.clip_sample else None
