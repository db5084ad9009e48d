"""A kernel's step is the step of the diffusers scheduler that it was read off."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from oracles import chain_marginal
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import (
    TransitionKernel,
    ddim_kernel,
    ddpm_kernel,
    euler_ancestral_kernel,
    flow_sde_kernel,
)
from ctrl_rl.priors import GaussianDenoiser, NetworkDenoiser

Config = dict[str, Any]

DDPM = [{"variance_type": name} for name in ("fixed_small", "fixed_small_log", "fixed_large")]
DDIM = [{"eta": 0.3}, {"eta": 1.0}]
BETAS: list[Config] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CLIPS: list[Config] = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.8},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5},
]
SPACINGS = ("leading", "trailing", "linspace")
FLOW_CONFIG: Config = {"prediction_type": "flow_prediction"}


class Wave(nn.Module):
    """A network that is not linear, and often beyond every clipping range."""

    def forward(self, x: Tensor, timestep: Tensor, embedding: Tensor | None) -> Tensor:
        return 1.5 * torch.sin(2 * x + expand_to(timestep, x) / 300)


def steps(
    sampler: Config, config: Config, num_steps: int = 4
) -> Iterator[tuple[TransitionKernel, int, Tensor, Tensor]]:
    """Kernel, step, and one draw of the next latent: the kernel's own and diffusers'.

    diffusers computes its coefficients in float32, where 1 - alpha_t / alpha_s near 1 keeps only
    about four digits. So it runs in float64 here, from the same float32 signal levels; the kernel's
    tables were made in float64 too.
    """
    eta = sampler.get("eta")
    timesteps = sampler.get("timesteps")
    ours = ("eta", "timesteps")
    config = config | {key: value for key, value in sampler.items() if key not in ours}
    if eta is None:
        kernel = ddpm_kernel(
            scheduler_config=config, num_steps=num_steps, final_noise=True, timesteps=timesteps
        )
        scheduler = DDPMScheduler.from_config(config)
        scheduler.one = scheduler.one.double()
    else:
        kernel = ddim_kernel(scheduler_config=config, num_steps=num_steps, eta=eta)
        scheduler = DDIMScheduler.from_config(config)
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if timesteps is None:
        scheduler.set_timesteps(len(kernel.timesteps))
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == kernel.timesteps.tolist()
    assert kernel.num_steps == num_steps

    denoiser = NetworkDenoiser(Wave(), config)
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(kernel.timesteps):
        x = torch.randn(3, 2, 4, 4, generator=generator)
        seed = int(torch.randint(1000, (1,), generator=generator))
        twins = [torch.Generator().manual_seed(seed) for _ in range(2)]
        noise = torch.randn(x.shape, generator=twins[0], dtype=torch.float64)
        prediction = denoiser.network(x, t.expand(3), None).double()
        if eta is None:
            expected = scheduler.step(prediction, t, x.double(), generator=twins[1])
        else:
            expected = scheduler.step(prediction, t, x.double(), eta=eta, variance_noise=noise)
        step = torch.full((3,), k)
        mean = kernel.mean(x, denoiser(x, t.expand(3)), step)
        assert mean.dtype == torch.float32
        drawn = mean + expand_to(kernel.scale[step], x) * noise
        yield kernel, k, drawn, expected.prev_sample


def check(sampler: Config, config: Config) -> None:
    for kernel, k, drawn, expected in steps(sampler, config):
        # Unclipped epsilon prediction divides by sqrt(alpha_bar): latents in the thousands there.
        deviation = ((drawn - expected).abs() / expected.abs().clamp(min=1)).max().item()
        assert deviation < 1e-6, (config, k, deviation)
        assert (kernel.scale[k] > 0) == (k < kernel.num_steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", BETAS, ids=lambda betas: betas["beta_schedule"])
@pytest.mark.parametrize("sampler", DDPM + DDIM, ids=lambda sampler: str(*sampler.values()))
def test_every_step_equals_diffusers(sampler: Config, betas: Config, prediction: str) -> None:
    for clip, spacing in itertools.product(CLIPS, spacings(sampler)):
        config = {"prediction_type": prediction, "timestep_spacing": spacing}
        check(sampler, {**betas, **clip, **config})


def spacings(sampler: Config) -> tuple[str, ...]:
    """Those with which diffusers' own step leads to the next timestep, with four or five steps."""
    return SPACINGS[:2] if "eta" in sampler else SPACINGS


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", DDPM + DDIM, ids=lambda sampler: str(*sampler.values()))
def test_variants_of_the_ends_equal_diffusers(sampler: Config, spacing: str) -> None:
    if spacing not in spacings(sampler):
        return
    base = {"timestep_spacing": spacing, "beta_schedule": "scaled_linear", "clip_sample": False}
    for prediction in PREDICTIONS:
        config = base | {"prediction_type": prediction}
        check(sampler, config | {"steps_offset": 1})
        check(sampler, config | {"set_alpha_to_one": False})
        check(sampler, config | {"set_alpha_to_one": False, "steps_offset": 1})
    for prediction in ("v_prediction", "sample"):
        check(sampler, base | {"prediction_type": prediction, "rescale_betas_zero_snr": True})


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_euler_steps_equal_diffusers(spacing: str, prediction: str) -> None:
    # diffusers' latents are this project's over the signal.
    for betas in BETAS:
        config = {**betas, "timestep_spacing": spacing, "prediction_type": prediction}
        kernel = euler_ancestral_kernel(scheduler_config=config, num_steps=6)
        scheduler = EulerAncestralDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(7)
        scheduler.sigmas = scheduler.sigmas.double()
        assert kernel.timesteps.tolist() == scheduler.timesteps.tolist()
        assert kernel.has_read_out and kernel.num_steps == 6
        denoiser = NetworkDenoiser(Wave(), config)
        generator = torch.Generator().manual_seed(0)
        for k, t in enumerate(scheduler.timesteps):
            x = torch.randn(3, 2, 4, 4, generator=generator)
            theirs = x.double() * (1 + scheduler.sigmas[k] ** 2).sqrt()
            scaled = scheduler.scale_model_input(theirs, t)
            torch.testing.assert_close(scaled.float(), x, rtol=1e-6, atol=1e-6)
            prediction_of = denoiser.network(x, t.expand(3), None).double()
            twins = [torch.Generator().manual_seed(k) for _ in range(2)]
            after = scheduler.step(prediction_of, t, theirs, generator=twins[0]).prev_sample
            noise = torch.randn(x.shape, generator=twins[1], dtype=torch.float64)
            step = torch.full((3,), k)
            mean = kernel.mean(x, denoiser(x, t.expand(3)), step)
            drawn = mean + expand_to(kernel.scale[step], x) * noise
            expected = after / (1 + scheduler.sigmas[k + 1] ** 2).sqrt()
            deviation = ((drawn - expected).abs() / expected.abs().clamp(min=1)).max().item()
            assert deviation < 1e-5, (config, k, deviation)


@pytest.mark.parametrize("timesteps", [[999, 700, 650, 20], [800, 300, 299, 1, 0]], ids=str)
@pytest.mark.parametrize("sampler", DDPM, ids=lambda sampler: str(*sampler.values()))
def test_timesteps_of_ones_own_equal_diffusers(sampler: Config, timesteps: list[int]) -> None:
    sampler = sampler | {"timesteps": timesteps}
    for betas, prediction in itertools.product(BETAS, PREDICTIONS):
        # The step that starts at timestep 0 never draws noise.
        num_steps = len(timesteps) - (timesteps[-1] == 0)
        if sampler["variance_type"] != "fixed_large":
            num_steps = len(timesteps) - 1
        config = betas | {"clip_sample": False, "prediction_type": prediction}
        for kernel, k, drawn, expected in steps(sampler, config, num_steps):
            deviation = ((drawn - expected).abs() / expected.abs().clamp(min=1)).max().item()
            assert deviation < 1e-6, (config, k, deviation)
            assert (kernel.scale[k] > 0) == (k < num_steps)


def test_the_schedulers_own_timesteps_said_aloud_change_nothing() -> None:
    config = {"timestep_spacing": "trailing"}
    silent = ddpm_kernel(scheduler_config=config, num_steps=9)
    aloud = ddpm_kernel(scheduler_config=config, num_steps=9, timesteps=silent.timesteps.tolist())
    for name, table in silent.named_buffers():
        assert torch.equal(table, aloud.get_buffer(name)), name


def test_offset_step_without_final_one_is_stochastic() -> None:
    # Stable Diffusion's scheduler: the last step still has noise, so every step is an action.
    config = {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "sample"}
    kernel = ddim_kernel(scheduler_config=config, num_steps=5)
    assert not kernel.has_read_out and len(kernel.timesteps) == kernel.num_steps == 5


@pytest.mark.parametrize("sampler", [*DDPM[::2], *DDIM], ids=lambda sampler: str(*sampler.values()))
def test_chain_reaches_the_known_marginal_at_first_order(sampler: Config) -> None:
    mean, std = 0.8, 0.6
    # Zero terminal signal, so that the start N(0, 1) is exact and only the steps' error is left.
    config = {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"}
    config |= {"rescale_betas_zero_snr": True, **sampler}
    eta = config.pop("eta", None)
    denoiser = GaussianDenoiser(mean=[mean], std=std, scheduler_config=config)
    errors = []
    for num_steps in (49, 99, 199):  # with the read-out, divisors of the 1000 timesteps
        kernel = (
            ddpm_kernel(scheduler_config=config, num_steps=num_steps)
            if eta is None
            else ddim_kernel(scheduler_config=config, num_steps=num_steps, eta=eta)
        )
        m, v = chain_marginal(kernel, denoiser)
        assert abs(m - mean) < 1e-5
        errors.append(abs(v - std**2))
    assert errors[-1] < 0.025
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.7 < coarse / fine < 2.3  # half the step, half the error


@pytest.mark.parametrize(
    ("make", "config", "settings", "fix"),
    [
        (ddim_kernel, {}, {"num_steps": 5, "eta": 0.0}, "use 0 < kernel.eta <= 1"),
        (ddim_kernel, {}, {"num_steps": 5, "eta": -0.5}, "use 0 < kernel.eta <= 1"),
        (ddim_kernel, {}, {"num_steps": 5, "eta": 3.0}, "use <= 1"),
        (ddim_kernel, {}, {"num_steps": 0}, "use 1 to 999"),
        (euler_ancestral_kernel, {}, {"num_steps": 0}, "use 1 to 999"),
        (
            euler_ancestral_kernel,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {"num_steps": 5},
            "use v_prediction",
        ),
        (euler_ancestral_kernel, FLOW_CONFIG, {"num_steps": 5}, "use kernel=flow_sde"),
        (ddpm_kernel, FLOW_CONFIG, {"num_steps": 1, "timesteps": [9, 1]}, "use kernel=flow_sde"),
        (ddim_kernel, FLOW_CONFIG, {"num_steps": 5}, "use kernel=flow_sde"),
        (flow_sde_kernel, {}, {"num_steps": 5}, "needs a flow-matching prior"),
        (flow_sde_kernel, FLOW_CONFIG, {"num_steps": 0}, "must be 1 or more"),
        (flow_sde_kernel, FLOW_CONFIG, {"num_steps": 2, "noise_level": 0.0}, "use a number > 0"),
        (ddpm_kernel, {}, {"num_steps": 0}, "use 1 to 999"),
        (ddpm_kernel, {}, {"num_steps": -3}, "use 1 to 999"),
        (ddpm_kernel, {}, {"num_steps": 1000}, "use 1 to 999"),
        (ddpm_kernel, {"variance_type": "learned_range"}, {"num_steps": 5}, "fixed_small"),
        (ddpm_kernel, {"variance_type": "fixed_large_log"}, {"num_steps": 5}, "fixed_large"),
        (
            ddpm_kernel,
            {},
            {"num_steps": 3, "timesteps": [900, 500, 100]},
            "make 2 stochastic steps",
        ),
        (ddpm_kernel, {}, {"num_steps": 2, "timesteps": [900, 100, 500]}, "fall strictly"),
        (ddpm_kernel, {}, {"num_steps": 2, "timesteps": [1000, 500, 100]}, "at most 999"),
        (ddpm_kernel, {}, {"num_steps": 2, "timesteps": [900, 500.5, 100]}, "whole numbers"),
        (ddpm_kernel, {}, {"num_steps": 1, "timesteps": []}, "fall strictly"),
        (
            ddpm_kernel,
            {"rescale_betas_zero_snr": True},
            {"num_steps": 1, "timesteps": [999, 0]},
            "use v_prediction",
        ),
        (ddpm_kernel, {"steps_offset": 1}, {"num_steps": 999}, "1000 timesteps; use 998$"),
        (
            ddpm_kernel,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {"num_steps": 5},
            "use v_prediction",
        ),
        (ddim_kernel, {"steps_offset": 100}, {"num_steps": 14}, "offset=100 .* use 8 or 111$"),
    ],
)
def test_what_has_no_density_is_refused_with_the_fix(
    make: Any, config: Config, settings: Config, fix: str
) -> None:
    with pytest.raises(ConfigError, match=fix):
        make(scheduler_config=config, **settings)


def test_tables_are_not_rounded_by_a_cast() -> None:
    kernel = ddpm_kernel(scheduler_config={}, num_steps=9)
    before = {name: table.clone() for name, table in kernel.named_buffers()}
    nn.Sequential(kernel).bfloat16()
    for name, table in kernel.named_buffers():
        assert table.dtype == (torch.int64 if name == "timesteps" else torch.float32)
        assert torch.equal(table, before[name]), name
    assert kernel.to("meta").scale.device.type == "meta"  # but moves go through


def test_the_last_step_draws_no_noise_unless_asked():
    """Ho, Jain, Abbeel 2020, algorithm 2: only the read-out differs from diffusers' fixed_large."""
    config = {"variance_type": "fixed_large", "timestep_spacing": "trailing"}
    quiet = ddpm_kernel(scheduler_config=config, num_steps=9)
    noisy = ddpm_kernel(scheduler_config=config, num_steps=10, final_noise=True)
    assert quiet.has_read_out and not noisy.has_read_out
    assert torch.equal(quiet.timesteps, noisy.timesteps)
    assert (
        torch.equal(quiet.scale[:-1], noisy.scale[:-1]) and quiet.scale[-1] == 0 < noisy.scale[-1]
    )


@pytest.mark.parametrize("sampler", [*DDPM, *DDIM])
def test_the_clean_estimate_behind_a_mean_is_found_again(sampler: Config) -> None:
    eta = sampler.get("eta")
    config = {**BETAS[2], "prediction_type": "v_prediction", "clip_sample": False} | (
        {} if eta else sampler
    )
    make = ddim_kernel if eta else ddpm_kernel
    kernel = make(scheduler_config=config, num_steps=7, **({"eta": eta} if eta else {}))
    step = torch.arange(kernel.num_steps)
    x, clean = torch.randn(2, kernel.num_steps, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = kernel.denoised(x, kernel.mean(x, clean, step), step)
    # Early means hardly depend on the estimate, which leaves fewer digits of it.
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)
