"""Train a small diffusion prior on an offline dataset, into a diffusers pipeline folder."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctrl_rl.data import OfflineDataset, as_float
from ctrl_rl.errors import ConfigError, NonFiniteError, did_you_mean, one_line

_TARGETS: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda scheduler, clean, noise, timestep: noise,
    "v_prediction": lambda scheduler, *parts: scheduler.get_velocity(*parts),
    "sample": lambda scheduler, clean, noise, timestep: clean,
}


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """How a prior is trained; `configs/recipe/*.yaml` explains each.

    Raises:
        ConfigError: a value out of range.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    split: str = "train"
    updates: int = 3000
    batch_size: int = 128
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.995
    half: bool = False
    seed: int = 0
    license: str = "mit"
    description: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.updates < 1 or self.batch_size < 1:
            raise ConfigError("recipe.updates and recipe.batch_size must be 1 or more")
        if not self.learning_rate > 0:
            raise ConfigError(f"recipe.learning_rate={self.learning_rate} must be > 0")
        if not 0 < self.ema_decay < 1:
            raise ConfigError(f"recipe.ema_decay={self.ema_decay} must be between 0 and 1")
        predicted, accepted = self.scheduler.get("prediction_type"), set(_TARGETS)
        if predicted not in accepted:
            hint = did_you_mean(str(predicted), accepted)
            raise ConfigError(f"unknown recipe.scheduler.prediction_type '{predicted}'; {hint}")


def pretrain(
    dataset: OfflineDataset,
    plan: PretrainPlan,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    report: Callable[[int, float], None] = lambda update, loss: None,
) -> dict[str, Any]:
    """Train an unconditional UNet by the denoising objective and save it as a `DDPMPipeline`.

    The scheduler's `prediction_type` decides the target: noise (Ho, Jain, Abbeel 2020, eq. 14),
    velocity (Salimans and Ho 2022, app. D) or the sample itself; mean squared error, timesteps
    uniform. Random numbers are the CPU's on every device. Deterministic on a CPU.

    Args:
        dataset: only its `plan.split` is used.
        plan: architecture, scheduler and optimisation.
        out: the folder to write; existing files in it are replaced.
        device: where the network is trained.
        report: called with (finished updates, loss), for a progress bar.

    Returns:
        Figures: parameters, updates, final mean loss, seconds.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    diffusers: Any = import_module("diffusers")  # heavy and untyped
    images = as_float(dataset.split(plan.split)[0])
    started = time.monotonic()
    generator = torch.Generator().manual_seed(plan.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        unet = _build(diffusers.UNet2DModel, plan.unet, "recipe.unet").to(device)
    scheduler = _build(diffusers.DDPMScheduler, plan.scheduler, "recipe.scheduler")
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=plan.learning_rate,
        betas=(plan.betas[0], plan.betas[1]),
        weight_decay=plan.weight_decay,
    )
    averaging = get_ema_multi_avg_fn(plan.ema_decay)
    average = AveragedModel(unet, multi_avg_fn=averaging)
    losses = []
    for update in range(plan.updates):
        factor = 0.5 * (1 + math.cos(math.pi * update / plan.updates))
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * factor
        index = torch.randint(len(images), (plan.batch_size,), generator=generator)
        loss = _denoising_loss(unet, scheduler, images[index], generator)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"loss {loss.item()} at update {update + 1}; try a lower recipe.learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(unet)
        losses.append(loss.item())
        report(update + 1, losses[-1])
    trained = average.module.cpu()
    if plan.half:
        trained = trained.half()
    tail = losses[-max(1, plan.updates // 10) :]
    figures = {
        "parameters": sum(p.numel() for p in trained.parameters()),
        "images": len(images),
        "updates": plan.updates,
        "loss": sum(tail) / len(tail),
    }
    diffusers.DDPMPipeline(unet=trained.eval(), scheduler=scheduler).save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(plan) | figures, indent=2) + "\n")
    (out / "README.md").write_text(_model_card(plan, figures))
    return figures | {"seconds": time.monotonic() - started}


def _build(kind: Any, settings: dict[str, Any], where: str) -> Any:
    try:
        return kind(**settings)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        reason = one_line(error)
        raise ConfigError(f"{where} does not fit diffusers' {kind.__name__}: {reason}") from error


def _denoising_loss(
    unet: nn.Module, scheduler: Any, clean: Tensor, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(clean.shape, generator=generator)
    limit = scheduler.config.num_train_timesteps
    timestep = torch.randint(limit, (len(clean),), generator=generator)
    noisy = scheduler.add_noise(clean, noise, timestep)
    target = _TARGETS[scheduler.config.prediction_type](scheduler, clean, noise, timestep)
    device = next(unet.parameters()).device
    prediction = unet(noisy.to(device), timestep.to(device), return_dict=False)[0]
    return nn.functional.mse_loss(prediction, target.to(device))


def _model_card(plan: PretrainPlan, figures: dict[str, Any]) -> str:
    notes = "\n".join(f"- {note}" for note in plan.notes)
    return f"""---
license: {plan.license}
library_name: diffusers
tags: [unconditional-image-generation, diffusion]
---
# {plan.description}

An unconditional `UNet2DModel` with {figures["parameters"]:,} parameters and
{plan.scheduler["prediction_type"]}, trained on the `{plan.split}` split ({figures["images"]:,}
images) for {plan.updates:,} updates of {plan.batch_size}, seed {plan.seed}; mean loss of the last
tenth {figures["loss"]:.4f}. `recipe.json` holds every setting. It loads with
`DDPMPipeline.from_pretrained` and with `prior=diffusers prior.path=<this folder>`.

{notes}
"""
