"""The updates of a classifier's fit: AdamW on noisy, blended batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctrl_rl.data import as_float
from ctrl_rl.errors import ConfigError, NonFiniteError
from ctrl_rl.networks.fitting import Fitting

_ELSEWHERE = ("train_split", "calibration_split", "report_split", "device")


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """How a classifier is fitted.

    Attributes:
        train_split: Split for the weights.
        calibration_split: Split for the temperature.
        report_split: Split for the report; nothing is fitted on it.
        epochs: Passes over the training split, at least 1.
        batch_size: Examples per update, at least 1.
        learning_rate: Peak rate of AdamW; falls to 0 along a half cosine.
        weight_decay: Decoupled weight decay of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).
        noise: Standard deviation of Gaussian noise added to every training example, in units of
            x. A sampler's x is seldom exactly on the data manifold, and the reward needs a
            gradient there too.
        calibration_noise: The same for calibration examples: the temperature is then right where
            the reward is used, but too high on clean examples.
        mixup: alpha of mixup (Zhang et al. 2018, arXiv 1710.09412): pairs of examples and labels
            are blended with a share from Beta(alpha, alpha); 0 for none. Logits then change evenly
            between the classes, where there are no data and a reward has to lead.
        label_smoothing: Share of every label that is spread over all labels in the fit, in [0, 1)
            (Szegedy et al. 2016, sec. 7). The temperature is fitted to the unsmoothed labels.
        seed: Seed of the batches and the noise.
        device: Where the network is fitted, such as cuda; examples stay on the CPU.

    Raises:
        ConfigError: If a number is out of range.
    """

    train_split: str
    calibration_split: str
    report_split: str
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    noise: float
    calibration_noise: float
    mixup: float
    label_smoothing: float
    seed: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, value in self.settings.items():
            lowest = 1 if name in ("epochs", "batch_size") else 0
            if not value >= lowest:
                raise ConfigError(f"{name}={value}, but must be {lowest} or more: raise it")
        if not self.label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing={self.label_smoothing}, but must be below 1: lower it"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The numbers."""
        return {name: value for name, value in asdict(self).items() if name not in _ELSEWHERE}

    @property
    def splits(self) -> dict[str, str]:
        """Names of splits by what they are for."""
        return {
            "train": self.train_split,
            "calibration": self.calibration_split,
            "report": self.report_split,
        }


class ClassifierFitting(Fitting):
    """Fits a network to labels; an update is a step of AdamW on one batch.

    Args:
        network: Maps x [B, *shape] to logits [B, num_labels]; trained in place.
        x: Examples [N, *shape], as an `OfflineDataset` has them.
        labels: int64 [N].
        num_labels: Number of classes.
        plan: Settings.
    """

    def __init__(
        self, network: nn.Module, x: Tensor, labels: Tensor, num_labels: int, plan: FitPlan
    ) -> None:
        self.updates_per_epoch = math.ceil(len(x) / plan.batch_size)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay
        )
        super().__init__(
            network.train(),
            optimizer,
            seed=plan.seed,
            total=plan.epochs * self.updates_per_epoch,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=plan.epochs)
        self.x, self.plan = x, plan
        self.targets = nn.functional.one_hot(labels, num_labels).float()
        self.order = torch.arange(len(x))  # of the examples in this epoch

    def update(self) -> float:
        """Makes one step on the next batch of the epoch; returns its cross-entropy in nats."""
        place = self.done % self.updates_per_epoch
        if place == 0:
            self.order = torch.randperm(len(self.x), generator=self.generator)
        loss = self._loss(self.order.split(self.plan.batch_size)[place])
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"loss {loss.item()} at update {self.done + 1}: the fit diverged, so lower its "
                "learning_rate"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if place == self.updates_per_epoch - 1:
            self.schedule.step()
        return loss.item()

    def _loss(self, rows: Tensor) -> Tensor:
        x, targets, generator = self.x, self.targets, self.generator
        # Drawn on the CPU, to be the same on every device.
        jitter = self.plan.noise * torch.randn(x[rows].shape, generator=generator)
        partners = rows[torch.randperm(len(rows), generator=generator)]
        share = _mixing_shares(len(rows), self.plan.mixup, generator)
        image_share = share.reshape(-1, *(1,) * (x.ndim - 1))
        images, others = as_float(x[rows]), as_float(x[partners])
        blend = image_share * images + (1 - image_share) * others + jitter
        target = share[:, None] * targets[rows] + (1 - share[:, None]) * targets[partners]
        logits = self.network(blend.to(self.device))
        return nn.functional.cross_entropy(
            logits, target.to(self.device), label_smoothing=self.plan.label_smoothing
        )

    def state(self) -> dict[str, Tensor]:
        """The same with the epoch's order and rate."""
        rate = self.optimizer.param_groups[0]["lr"]
        return {
            **super().state(),
            "order": self.order,
            "rate": torch.tensor(rate, dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The same with the epoch's order and rate."""
        super().restore(state)
        self.order = state["order"]
        rate, epoch = state["rate"].item(), self.done // self.updates_per_epoch
        self.optimizer.param_groups[0]["lr"] = rate  # the schedule goes on from it
        at = {"last_epoch": epoch, "_step_count": epoch + 1, "_last_lr": [rate]}
        self.schedule.load_state_dict({**self.schedule.state_dict(), **at})


def _mixing_shares(n: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draws from Beta(alpha, alpha): float32 [n]; all 1, no blending, for alpha = 0."""
    if alpha == 0:
        return torch.ones(n)
    # torch's Beta takes no generator, NumPy's does: seed it with a draw from ours.
    seed = int(torch.randint(2**31, (1,), generator=generator))
    shares = np.random.default_rng(seed).beta(alpha, alpha, n)
    return torch.as_tensor(shares, dtype=torch.float32)
