"""The timesteps that a kernel visits: where every step leads, and how many there are."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from oracles import chain_marginal

from ctrl_rl.errors import ConfigError
from ctrl_rl.export.schedulers import scheduler_of
from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import ddim_kernel, ddpm_kernel, euler_ancestral_kernel
from ctrl_rl.priors import GaussianDenoiser

SPACINGS = ("leading", "trailing", "linspace")
KERNELS = {
    "ddpm": (ddpm_kernel, {}),
    "ddpm with final noise": (ddpm_kernel, {"final_noise": True}),
    "ddim": (ddim_kernel, {}),
    "euler": (euler_ancestral_kernel, {}),
}


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("num_steps", [4, 7, 12])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_mean_of_a_gaussian_is_exact(spacing: str, num_steps: int, eta: float) -> None:
    # Zero terminal signal, so that the start N(0, 1) is exact; with linspace diffusers' own steps
    # end at 0.462 with K = 4.
    config = {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": spacing}
    config |= {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    denoiser = GaussianDenoiser(mean=[0.5], std=0.7, scheduler_config=config)
    kernel = ddim_kernel(scheduler_config=config, num_steps=num_steps, eta=eta)
    mean, _ = chain_marginal(kernel, denoiser)
    # `leading` does not start at the last timestep, where the start would be exact.
    first = float(denoiser.levels(kernel.timesteps[:1])[0])
    assert abs(mean - 0.5) <= (0.5 * first if spacing == "leading" else 1e-5)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_implicit_steps_are_diffusers_on_the_visited_timesteps_alone(
    spacing: str, end: bool
) -> None:
    """Respaced betas (Nichol, Dhariwal 2021, sec. 4), by which its T // S is the next timestep."""
    config = {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": spacing}
    config |= {"set_alpha_to_one": end}
    kernel = ddim_kernel(scheduler_config=config, num_steps=7, eta=0.6)
    number = len(kernel.timesteps)
    stock = DDIMScheduler.from_config(config)
    visited = stock.alphas_cumprod[kernel.timesteps.flip(0)].double()
    betas = 1 - visited / torch.cat([torch.ones(1), visited[:-1]])
    respaced = DDIMScheduler.from_config(
        config, num_train_timesteps=number, trained_betas=betas.tolist(), timestep_spacing="leading"
    )
    respaced.set_timesteps(number)
    respaced.alphas_cumprod = visited
    final = torch.ones(()) if end else stock.alphas_cumprod[0]
    respaced.final_alpha_cumprod = final.double()
    exported = scheduler_of({"scheduler": "VisitedDDIMScheduler", "scheduler_settings": {}}, config)
    exported.set_timesteps(number)
    assert exported.timesteps.tolist() == kernel.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for k in range(number):
        x, clean, noise = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
        given = {"eta": 0.6, "variance_noise": noise}
        expected = respaced.step(clean, number - 1 - k, x, **given).prev_sample
        step = torch.full((2,), k)
        found = kernel.mean(x, clean, step) + expand_to(kernel.scale[step], x) * noise
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        others = exported.step(clean, kernel.timesteps[k], x, **given).prev_sample
        torch.testing.assert_close(others, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_can_be_had(name: str, spacing: str, end: bool) -> None:
    # 60, 102, 120 and 121 are where diffusers' trailing spacing has one timestep too many.
    config = {"timestep_spacing": spacing, "prediction_type": "sample", "set_alpha_to_one": end}
    config |= {"variance_type": "fixed_large"}
    make, more = KERNELS[name]
    for num_steps in (*range(1, 25), 50, 60, 61, 102, 120, 121, 122, 333, 499, 500, 997, 999):
        kernel = make(scheduler_config=config, num_steps=num_steps, **more)
        assert kernel.num_steps == num_steps and (kernel.scale[:num_steps] > 0).all()
        assert (kernel.timesteps >= 0).all() and (kernel.timesteps.diff() < 0).all()
        if spacing != "leading":
            assert kernel.timesteps[0] == 999


@pytest.mark.parametrize("make", [ddpm_kernel, ddim_kernel, euler_ancestral_kernel])
@pytest.mark.parametrize("offset", [1, 9, 30])
def test_a_number_that_cannot_be_had_names_the_nearest_that_can(make: Any, offset: int) -> None:
    config = {"timestep_spacing": "leading", "steps_offset": offset, "num_train_timesteps": 150}
    config |= {"prediction_type": "sample"}
    had, refused = [], {}
    for num_steps in range(1, 150):
        try:
            assert make(scheduler_config=config, num_steps=num_steps).num_steps == num_steps
            had.append(num_steps)
        except ConfigError as error:
            refused[num_steps] = str(error)
    assert had and refused
    for num_steps, told in refused.items():
        near = [max((n for n in had if n < num_steps), default=0)]
        near += [min((n for n in had if n > num_steps), default=0)]
        assert told.endswith(f"use {' or '.join(str(n) for n in near if n)}"), told


def test_where_no_number_can_be_had_the_offset_is_named() -> None:
    config = {"steps_offset": 99, "num_train_timesteps": 100, "prediction_type": "sample"}
    with pytest.raises(ConfigError, match="steps_offset=99 .* use prior.scheduler={steps_offset:0"):
        ddim_kernel(scheduler_config=config, num_steps=10)


def test_no_kernel_calls_the_network_at_a_timestep_that_is_none() -> None:
    """Diffusers has 62 timesteps for 61 here, the last of them -1."""
    stock = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(61)
    assert len(stock.timesteps) == 62 and stock.timesteps[-1] == -1
    kernel = ddpm_kernel(scheduler_config={"timestep_spacing": "trailing"}, num_steps=60)
    assert kernel.timesteps.tolist() == stock.timesteps[:-1].tolist()
    for name in ("DDPM", "DDIM", "EulerAncestral"):
        prefix = "UnitStart" if name == "EulerAncestral" else "Visited"
        scheduler = scheduler_of(
            {"scheduler": f"{prefix}{name}Scheduler", "scheduler_settings": {}},
            {"timestep_spacing": "trailing"},
        )
        scheduler.set_timesteps(61)
        assert scheduler.timesteps.tolist() == kernel.timesteps.tolist()
        if name == "EulerAncestral":
            assert len(scheduler.sigmas) == 62 and scheduler.sigmas[-1] == 0
