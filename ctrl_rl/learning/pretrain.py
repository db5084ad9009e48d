"""Train a small diffusion prior on an offline dataset, into a diffusers pipeline folder."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctrl_rl.data import OfflineDataset, as_float
from ctrl_rl.errors import ConfigError, NonFiniteError, did_you_mean, one_line
from ctrl_rl.files import write_text
from ctrl_rl.networks.fitting import Fitting, without_prefix
from ctrl_rl.products import Product
from ctrl_rl.unfinished import unfinished

PRIOR = Product(
    name="prior",
    files=re.compile(
        r"recipe\.json|README\.md|model_index\.json|scheduler/scheduler_config\.json"
        r"|unet/(config\.json|diffusion_pytorch_model[^/]*)"
    ),
    told_by="recipe.json",
    fields=frozenset({"unet", "scheduler", "parameters", "updates", "loss"}),
)

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
    uniform. Random numbers are the CPU's on every device. Deterministic on a CPU, also when it
    stops and the same call resumes it.

    Args:
        dataset: only its `plan.split` is used.
        plan: architecture, scheduler and optimisation.
        out: the folder to write; an earlier prior in it is replaced.
        device: where the network is trained.
        report: called with (finished updates, loss), for a progress bar.

    Returns:
        Figures: parameters, updates, final mean loss, seconds of this call.

    Raises:
        ConfigError: a setting that diffusers refuses, `out` holds anything but a prior, or it was
            stopped with other settings.
        NonFiniteError: the loss is not finite.
        RunError: `out` cannot be written, or another process writes it.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    diffusers: Any = import_module("diffusers")  # heavy and untyped
    started = time.monotonic()
    images = as_float(dataset.split(plan.split)[0])
    scheduler = _build(diffusers.DDPMScheduler, plan.scheduler, "recipe.scheduler")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        unet = _build(diffusers.UNet2DModel, plan.unet, "recipe.unet").to(device)
    training = _Pretraining(unet, scheduler, images, plan)
    decides = {
        **asdict(plan),
        "dataset": dataset.fingerprint,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    with unfinished(out, PRIOR, decides) as work:
        work.finish(training, report)
        trained = training.average.module.cpu()
        if plan.half:
            trained = trained.half()
        tail = training.losses[-max(1, plan.updates // 10) :]
        figures = {
            "parameters": sum(p.numel() for p in trained.parameters()),
            "images": len(images),
            "updates": plan.updates,
            "loss": sum(tail) / len(tail),
        }
        with work.result() as folder:
            diffusers.DDPMPipeline(unet=trained.eval(), scheduler=scheduler).save_pretrained(folder)
            recipe = json.dumps(asdict(plan) | figures, indent=2)
            write_text(folder / "recipe.json", recipe + "\n")
            write_text(folder / "README.md", _model_card(plan, figures))
    return figures | {"seconds": time.monotonic() - started}


class _Pretraining(Fitting):
    """The training of a UNet, and the moving average of its weights.

    Args:
        unet: on its device.
        scheduler: of diffusers; adds the noise.
        images: [N, C, H, W] in [-1, 1], on the CPU.
        plan: settings.

    Attributes:
        losses: of every finished update.
    """

    def __init__(self, unet: Any, scheduler: Any, images: Tensor, plan: PretrainPlan) -> None:
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=plan.learning_rate,
            betas=(plan.betas[0], plan.betas[1]),
            weight_decay=plan.weight_decay,
        )
        super().__init__(unet, optimizer, seed=plan.seed, total=plan.updates)
        self.scheduler, self.images, self.plan = scheduler, images, plan
        self.average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(plan.ema_decay))
        self.losses: list[float] = []

    def update(self) -> float:
        """Make one step of AdamW on a batch."""
        factor = 0.5 * (1 + math.cos(math.pi * self.done / self.plan.updates))
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate * factor
        size = (self.plan.batch_size,)
        index = torch.randint(len(self.images), size, generator=self.generator)
        loss = self._loss(self.images[index])
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"loss {loss.item()} at update {self.done + 1}; try a lower recipe.learning_rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.losses.append(loss.item())
        return self.losses[-1]

    def _loss(self, clean: Tensor) -> Tensor:
        """The denoising loss of a batch [B, C, H, W], with noise of its own."""
        scheduler = self.scheduler
        noise = torch.randn(clean.shape, generator=self.generator)
        limit = scheduler.config.num_train_timesteps
        timestep = torch.randint(limit, (len(clean),), generator=self.generator)
        noisy = scheduler.add_noise(clean, noise, timestep)
        target = _TARGETS[scheduler.config.prediction_type](scheduler, clean, noise, timestep)
        inputs = (noisy.to(self.device), timestep.to(self.device))
        prediction = self.network(*inputs, return_dict=False)[0]
        return nn.functional.mse_loss(prediction, target.to(self.device))

    def state(self) -> dict[str, Tensor]:
        """The same with the average and the losses."""
        averaged = self.average.state_dict()
        return {
            **super().state(),
            **{f"average.{name}": value for name, value in averaged.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The same with the average and the losses."""
        super().restore(state)
        self.average.load_state_dict(without_prefix(state, "average."))
        self.losses = state["losses"].tolist()


def _build(kind: Any, settings: dict[str, Any], where: str) -> Any:
    try:
        return kind(**settings)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        reason = one_line(error)
        raise ConfigError(f"{where} does not fit diffusers' {kind.__name__}: {reason}") from error


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
