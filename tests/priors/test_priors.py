"""Priors: closed forms, conversions of prediction types, frozen weights, folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_pipeline
from torch import Tensor, nn

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import ConfigError
from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import ddpm_kernel
from ctrl_rl.kernels.accepted import FLOW
from ctrl_rl.kernels.levels import noise_levels
from ctrl_rl.priors import (
    GaussianDenoiser,
    MixtureDenoiser,
    NetworkDenoiser,
    Prior,
    diffusers_unet_prior,
    gaussian_prior,
    mixture_prior,
)
from ctrl_rl.rewards import FunctionReward

SCHEDULER: dict[str, Any] = {"prediction_type": "sample", "clip_sample": False}
MEANS = [[-1.5, 0.5], [0.2, -0.3], [1.0, 1.8]]


def mixture(
    std: float = 0.4, means: list[list[float]] = MEANS, **scheduler: Any
) -> MixtureDenoiser:
    return MixtureDenoiser(means=means, std=std, scheduler_config=SCHEDULER | scheduler)


class Oracle(nn.Module):
    """A perfect network for a mixture, in any prediction type."""

    def __init__(self, prediction_type: str) -> None:
        super().__init__()
        flow = {"prediction_type": prediction_type} if prediction_type == FLOW else {}
        self.exact, self.prediction_type = mixture(**flow), prediction_type

    def forward(self, x: Tensor, timestep: Tensor, embedding: Tensor | None) -> Tensor:
        clean = self.exact(x, timestep)
        a, b = (expand_to(level, x) for level in self.exact.levels(timestep))
        noise = (x - a * clean) / b
        return {
            "sample": clean,
            "epsilon": noise,
            "v_prediction": a * noise - b * clean,
            "flow_prediction": noise - clean,
        }[self.prediction_type]


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction", FLOW])
def test_perfect_network_of_any_prediction_type_gives_the_posterior_mean(
    prediction_type: str,
) -> None:
    config = SCHEDULER | {"prediction_type": prediction_type}
    denoiser = NetworkDenoiser(Oracle(prediction_type), config)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    timestep = torch.randint(20, 700, (64,), generator=torch.Generator().manual_seed(1))
    exact = denoiser.network.exact(x, timestep)
    torch.testing.assert_close(denoiser(x, timestep), exact, rtol=1e-5, atol=1e-5)


def test_levels_between_timesteps_are_the_euler_schedulers() -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    config = {"beta_schedule": "scaled_linear", "timestep_spacing": "linspace"}
    scheduler = EulerAncestralDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(7)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()
    levels = noise_levels(config)
    signal, noise = levels(scheduler.timesteps)
    torch.testing.assert_close(noise / signal, scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones(7))
    whole = torch.tensor([0, 17, 999])
    for found, table in zip(levels(whole.float()), levels(whole), strict=True):
        assert torch.equal(found, table)


def test_mixture_denoiser_equals_the_integral() -> None:
    means, std = [[-1.8], [-0.6], [0.7]], 0.3
    denoiser = mixture(std, means)
    z = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    prior = sum(torch.exp(-((z - m[0]) ** 2) / (2 * std**2)) for m in means)
    x = torch.linspace(-2.5, 2.5, 11)
    for timestep in (5, 100, 400, 999):
        signal, noise = (level.double() for level in denoiser.levels(torch.tensor(timestep)))
        residual = x.double()[:, None] - signal * z
        posterior = prior * torch.exp(-(residual**2) / (2 * noise**2))
        exact = (posterior * z).sum(1) / posterior.sum(1)
        clean = denoiser(x[:, None], torch.full((11,), timestep))[:, 0]
        torch.testing.assert_close(clean.double(), exact, rtol=1e-4, atol=1e-4)


def test_mixture_denoiser_obeys_tweedie() -> None:
    denoiser = mixture()
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)).double()
    for timestep in (50, 300, 800):
        signal, noise = (level.double() for level in denoiser.levels(torch.tensor(timestep)))
        variance = (0.4 * signal) ** 2 + noise**2

        def log_density(x: Tensor, a: Tensor = signal, v: Tensor = variance) -> Tensor:
            means = a * torch.tensor(MEANS, dtype=torch.float64)
            return (-(x[:, None] - means).square().sum(-1) / (2 * v)).logsumexp(1).sum()

        score = torch.autograd.functional.jacobian(log_density, x)
        exact = (x + noise**2 * score) / signal
        clean = denoiser(x.float(), torch.full((32,), timestep))
        torch.testing.assert_close(clean.double(), exact, rtol=1e-4, atol=1e-4)


def test_gaussian_is_the_mixture_of_one() -> None:
    x, timestep = torch.randn(8, 2), torch.full((8,), 200)
    one = GaussianDenoiser(mean=[0.3, -1.0], std=0.5, scheduler_config=SCHEDULER)
    assert torch.equal(one(x, timestep), mixture(0.5, [[0.3, -1.0]])(x, timestep))


def test_prior_is_frozen_and_stays_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor, timestep: Tensor, embedding: Tensor | None) -> Tensor:
            return self.net(x)

    prior = Prior(
        NetworkDenoiser(Mine(), SCHEDULER), SCHEDULER, shape=(2,), decoder=nn.Linear(2, 3)
    )
    nn.Sequential(prior).train()
    assert not any(module.training for module in prior.modules())
    x = torch.randn(5, 2, requires_grad=True)
    sample = prior.decode(prior.denoiser(x, torch.zeros(5, dtype=torch.int64)))
    assert sample.shape == (5, 3)
    sample.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0  # through it, but never into it
    assert all(p.grad is None and not p.requires_grad for p in prior.parameters())


def test_three_lines_make_a_prior_of_any_module() -> None:
    class MyNetwork(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, embedding: Tensor | None) -> Tensor:
            return 0.5 * x

    prior = Prior(NetworkDenoiser(MyNetwork(), SCHEDULER), SCHEDULER, shape=(2, 3))
    reward = FunctionReward(
        function=lambda sample, control: sample.mean((1, 2)), controls={"y": 2}, differentiable=True
    )
    kernel = ddpm_kernel(scheduler_config=prior.scheduler_config, num_steps=3)
    env = LatentEnv(DenoisingProcess(prior=prior, kernel=kernel, reward=reward), num_envs=4)
    episode = env.rollout(3)
    assert episode["next", "sample"].shape == (4, 3, 2, 3)
    # The read-out of a network that predicts the sample is its prediction.
    torch.testing.assert_close(episode["next", "sample"][:, -1], 0.5 * episode["action"][:, -1])


def test_checkpointing_changes_no_gradient(tiny_pipeline: Path) -> None:
    denoiser = diffusers_unet_prior(path=str(tiny_pipeline)).denoiser
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for denoiser.execution.checkpointing in (False, True):
        x = start.clone().requires_grad_()
        denoiser(x, torch.tensor([10, 700])).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_cast_rounds_weights_but_no_tables(tiny_pipeline: Path) -> None:
    prior = diffusers_unet_prior(path=str(tiny_pipeline))
    denoiser = prior.denoiser
    assert isinstance(denoiser, NetworkDenoiser)
    levels = {name: level.clone() for name, level in denoiser.levels.named_buffers()}
    x, timestep = torch.randn(2, 1, 4, 4), torch.tensor([10, 700])
    exact = denoiser(x, timestep)
    prior.bfloat16()
    assert {p.dtype for p in prior.parameters()} == {torch.bfloat16}
    assert all(torch.equal(level, levels[n]) for n, level in denoiser.levels.named_buffers())
    clean = denoiser(x, timestep)
    assert clean.dtype == torch.float32
    torch.testing.assert_close(clean, exact, rtol=0.05, atol=0.05)

    analytic = gaussian_prior(mean=[0.5], std=0.7, scheduler=SCHEDULER)
    table = analytic.denoiser.get_buffer("levels.signal").clone()
    assert torch.equal(analytic.bfloat16().denoiser.get_buffer("levels.signal"), table)


@pytest.mark.parametrize("missing", ["scheduler", "unet/config.json", "unet"])
def test_folder_without_a_part_is_refused_by_name(
    tiny_pipeline: Path, tmp_path: Path, missing: str
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "broken"))
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ConfigError, match=f"has no {missing}.*give a diffusers pipeline"):
        diffusers_unet_prior(path=str(folder))


def test_broken_weights_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "broken"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read as a UNet2DModel"):
        diffusers_unet_prior(path=str(folder))


def test_broken_scheduler_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "broken"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilom"}))
    with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
        diffusers_unet_prior(path=str(folder))
    config.write_text("{")
    with pytest.raises(ConfigError, match="scheduler_config.json"):
        diffusers_unet_prior(path=str(folder))


@pytest.mark.parametrize("unet", [{"num_class_embeds": 3}, {"out_channels": 2}])
def test_network_with_more_than_a_clean_estimate_is_refused(
    tmp_path: Path, unet: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match="give an unconditional one"):
        diffusers_unet_prior(path=str(save_tiny_pipeline(tmp_path, **unet)))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_width_must_be_positive(std: float) -> None:
    with pytest.raises(ConfigError, match="must be > 0"):
        gaussian_prior(mean=[0.0], std=std, scheduler=SCHEDULER)
    with pytest.raises(ConfigError, match="must be > 0"):
        mixture_prior(means=[[0.0]], std=std, scheduler=SCHEDULER)
