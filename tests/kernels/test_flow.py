"""Flow matching with noise: the published formula, diffusers' deterministic limit, marginals."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from oracles import chain_marginal
from torch import Tensor

from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import flow_sde_kernel
from ctrl_rl.kernels.accepted import FLOW
from ctrl_rl.priors import GaussianDenoiser

CONFIGS: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0},
    "schnell": {"shift": 1.0, "uniform_sigmas": True},
    "dev": {"use_dynamic_shifting": True, "mu": 0.9, "uniform_sigmas": True},
}
K = 6


def scheduler_of(config: dict[str, Any]) -> Any:
    ours = ("mu", "uniform_sigmas")
    own = {key: value for key, value in config.items() if key not in ours}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(own)
    n = K + 1
    sigmas = [1 - i / n for i in range(n)] if "uniform_sigmas" in config else None
    scheduler.set_timesteps(n, sigmas=sigmas, mu=config.get("mu"))
    return scheduler


def published(x: Tensor, v: Tensor, sigmas: Tensor, k: int, noise_level: float) -> Any:
    """Flow-GRPO, eq. 9, as written: mean and standard deviation."""
    t, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
    g = noise_level * (t / (1 - (sigmas[1] if t == 1 else t))).sqrt()
    mean = x + (v + g**2 / (2 * t) * (x + (1 - t) * v)) * dt
    return mean, g * (-dt).sqrt()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_steps_are_the_published_ones(name: str, noise_level: float) -> None:
    config = CONFIGS[name]
    kernel = flow_sde_kernel(
        scheduler_config=config | {"prediction_type": FLOW}, num_steps=K, noise_level=noise_level
    )
    scheduler = scheduler_of(config)
    torch.testing.assert_close(kernel.timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-4)
    assert kernel.has_read_out and kernel.num_steps == K
    generator = torch.Generator().manual_seed(0)
    sigmas = scheduler.sigmas.double()
    for k, t in enumerate(scheduler.timesteps):
        x, v = torch.randn(2, 3, 2, 4, 4, generator=generator)
        denoised = x - expand_to(sigmas[k], x) * v
        found = kernel.mean(x, denoised.float(), torch.full((3,), k))
        if k < K:
            mean, std = published(x.double(), v.double(), sigmas, k, noise_level)
            assert float(kernel.scale[k]) == pytest.approx(float(std), rel=1e-5)
        else:  # the read-out is diffusers' own last step
            mean = scheduler.step(v, t, x).prev_sample.double()
        torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_noise_it_is_diffusers_euler_step(name: str) -> None:
    config = CONFIGS[name]
    kernel = flow_sde_kernel(
        scheduler_config=config | {"prediction_type": FLOW}, num_steps=K, noise_level=1e-4
    )
    scheduler = scheduler_of(config)
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps):
        x, v = torch.randn(2, 3, 2, 4, 4, generator=generator)
        denoised = x - expand_to(scheduler.sigmas[k], x) * v
        expected = scheduler.step(v, t, x).prev_sample
        found = kernel.mean(x, denoised, torch.full((3,), k))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_chain_reaches_the_known_marginal(noise_level: float) -> None:
    mean, std = 0.8, 0.6
    config = {"prediction_type": FLOW, "shift": 3.0, "uniform_sigmas": True}
    denoiser = GaussianDenoiser(mean=[mean], std=std, scheduler_config=config)
    errors = []
    for num_steps in (49, 99, 199):
        kernel = flow_sde_kernel(
            scheduler_config=config, num_steps=num_steps, noise_level=noise_level
        )
        m, v = chain_marginal(kernel, denoiser)
        assert abs(m - mean) < 1e-5
        errors.append(abs(v - std**2))
    assert errors[-1] < 0.01
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.7 < coarse / fine < 2.7  # half the step, about half the error
