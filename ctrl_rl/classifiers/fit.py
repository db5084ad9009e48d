"""Fit a classifier on one split, calibrate it on a second and report on a third."""

from __future__ import annotations

import copy
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ctrl_rl.classifiers.calibration import (
    CalibrationReport,
    fit_temperature,
    measure_calibration,
    reliability_diagram,
)
from ctrl_rl.classifiers.classifier import Classifier
from ctrl_rl.classifiers.folder import (
    DIAGRAM_FILE,
    REPORT_FILE,
    check_replaceable,
    replaced_folder,
)
from ctrl_rl.data import OfflineDataset, as_float
from ctrl_rl.errors import ConfigError

# Draws of the noise per calibration example: a few steady the temperature at little cost.
NOISE_DRAWS = 8
# Bound the memory of an evaluation pass; the figures do not depend on them.
EVALUATION_ROWS, EVALUATION_VALUES = 1024, 2**22


def fit_classifier(
    *,
    network: nn.Module,
    dataset: OfflineDataset,
    train_split: str,
    calibration_split: str,
    report_split: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    noise: float,
    calibration_noise: float,
    mixup: float,
    label_smoothing: float,
    seed: int,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[Classifier, CalibrationReport]:
    """Fits with AdamW and a cosine schedule, then fits the temperature.

    The result depends on the arguments only, bit for bit on a CPU. The global random state and
    `network`, which is copied, stay untouched.

    Args:
        network: Maps x [B, *shape] to logits [B, num_labels]; gives the initial weights.
        dataset: The labelled examples and their splits.
        train_split: Split for the weights.
        calibration_split: Split for the temperature.
        report_split: Split for the report; nothing is fitted on it.
        epochs: Passes over the training split, at least 1.
        batch_size: Examples per step, at least 1.
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
        progress: Whether to show a progress bar.

    Returns:
        The frozen, calibrated classifier, and its figures on the report split.

    Raises:
        ConfigError: If two splits are the same, a number is out of range, the network does not
            fit the dataset or the fitted network is no better than chance.
        NonFiniteError: If the fit diverges.
    """
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "noise": noise,
        "calibration_noise": calibration_noise,
        "mixup": mixup,
        "label_smoothing": label_smoothing,
        "seed": seed,
    }
    for name, value in settings.items():
        lowest = 1 if name in ("epochs", "batch_size") else 0
        if not value >= lowest:
            raise ConfigError(f"{name}={value}, but must be {lowest} or more: raise it")
    if not label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing}, but must be below 1: lower it")
    splits = {"train": train_split, "calibration": calibration_split, "report": report_split}
    if len(set(splits.values())) < len(splits):
        raise ConfigError(
            f"train_split={train_split!r}, calibration_split={calibration_split!r} and "
            f"report_split={report_split!r} must be three different splits, or the figures would "
            f"flatter: choose among {', '.join(dataset.splits)}"
        )
    train, calibration, report_on = (dataset.split(name) for name in splits.values())
    network = copy.deepcopy(network).to(device)
    _check_network(network, dataset)
    fitting = {name: value for name, value in settings.items() if name != "calibration_noise"}
    _train(network, *train, **fitting, num_labels=dataset.num_labels, progress=progress)

    classifier = Classifier(
        network=network,
        num_labels=dataset.num_labels,
        label_names=dataset.label_names,
        shape=dataset.shape,
    )
    generator = torch.Generator().manual_seed(seed)
    noisy = [
        _logits(classifier, calibration[0], noise=calibration_noise, generator=generator)
        for _ in range(NOISE_DRAWS)
    ]
    temperature = fit_temperature(torch.cat(noisy), calibration[1].repeat(NOISE_DRAWS))
    report = measure_calibration(
        logits=_logits(classifier, report_on[0]), labels=report_on[1], temperature=temperature
    )
    classifier.temperature.fill_(temperature)
    classifier.metadata = {
        "report": asdict(report),
        "splits": splits,
        "dataset_fingerprint": dataset.fingerprint,
        "settings": settings,
        "torch": torch.__version__,
    }
    return classifier, report


def run_classifier_fit(
    *, network: nn.Module, dataset: OfflineDataset, out: str | Path, **settings: Any
) -> CalibrationReport:
    """Fits a classifier and writes it, its figures and its reliability diagram into a folder.

    The folder appears complete or not at all: `classifier.safetensors`, `classifier.json`,
    `report.json` and `reliability.png`.

    Args:
        network: As for `fit_classifier`.
        dataset: As for `fit_classifier`.
        out: Folder to write. An earlier classifier there is replaced.
        **settings: All other arguments of `fit_classifier`.

    Returns:
        The figures on the report split.

    Raises:
        ConfigError: If `out` holds anything but a classifier, or as in `fit_classifier`.
    """
    out = Path(out).expanduser().absolute()
    # Checked first: a refusal after a long fit would lose the fit.
    check_replaceable(out)
    classifier, report = fit_classifier(network=network, dataset=dataset, **settings)
    # Only the program's name: where it was installed is private.
    classifier.metadata["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    report_split = settings["report_split"]
    x, labels = dataset.split(report_split)
    with replaced_folder(out) as folder:
        classifier.save(folder)
        (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
        reliability_diagram(
            folder / DIAGRAM_FILE,
            logits=_logits(classifier, x),
            labels=labels,
            temperature=report.temperature,
            title=f"{type(network).__name__} on the {report_split!r} split",
        )
    return report


def _train(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    noise: float,
    mixup: float,
    label_smoothing: float,
    seed: int,
    num_labels: int,
    progress: bool,
) -> None:
    network.train()
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs)
    targets = nn.functional.one_hot(labels, num_labels).float()
    columns = (
        TextColumn("Fitting the classifier"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, loss {task.fields[loss]:.4f} nats,"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=epochs, loss=float("nan"))
        for _ in range(epochs):
            loss_sum = 0.0
            for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                # Drawn on the CPU, to be the same on every device.
                jitter = noise * torch.randn(x[rows].shape, generator=generator)
                partners = rows[torch.randperm(len(rows), generator=generator)]
                share = _mixing_shares(len(rows), mixup, generator)
                image_share = share.reshape(-1, *(1,) * (x.ndim - 1))
                images, others = as_float(x[rows]), as_float(x[partners])
                blend = image_share * images + (1 - image_share) * others + jitter
                target = share[:, None] * targets[rows] + (1 - share[:, None]) * targets[partners]
                logits = network(blend.to(device))
                loss = nn.functional.cross_entropy(
                    logits, target.to(device), label_smoothing=label_smoothing
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                loss_sum += loss.item() * len(rows)
            schedule.step()
            bar.update(task, advance=1, loss=loss_sum / len(x))


def _mixing_shares(n: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draws from Beta(alpha, alpha): float32 [n]; all 1, no blending, for alpha = 0."""
    if alpha == 0:
        return torch.ones(n)
    # torch's Beta takes no generator, NumPy's does: seed it with a draw from ours.
    seed = int(torch.randint(2**31, (1,), generator=generator))
    shares = np.random.default_rng(seed).beta(alpha, alpha, n)
    return torch.as_tensor(shares, dtype=torch.float32)


@torch.no_grad()
def _logits(
    classifier: Classifier,
    x: Tensor,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    rows = max(1, min(EVALUATION_ROWS, EVALUATION_VALUES // x[0].numel()))
    logits = []
    for batch in x.split(rows):
        images = as_float(batch)
        if noise:
            images = images + noise * torch.randn(images.shape, generator=generator)
        logits.append(classifier.logits(images.to(classifier.temperature.device)).cpu())
    return torch.cat(logits)


@torch.no_grad()
def _check_network(network: nn.Module, dataset: OfflineDataset) -> None:
    device = next(network.parameters()).device
    try:
        example = as_float(dataset.x[:1]).to(device)
        does = f"returns {list(network.eval()(example).shape)}"
    except (RuntimeError, ValueError) as error:
        does = f"fails ({str(error).splitlines()[0]})"
    if does != f"returns {[1, dataset.num_labels]}":
        raise ConfigError(
            f"{type(network).__name__} {does} for one example of shape {list(dataset.shape)}, but "
            f"must return [1, {dataset.num_labels}] logits: build it for this dataset"
        )
