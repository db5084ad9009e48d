"""Fit a classifier on one split, calibrate it on a second and report on a third."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor, nn

from ctrl_rl.classifiers.calibration import (
    CalibrationReport,
    fit_temperature,
    measure_calibration,
    reliability_diagram,
)
from ctrl_rl.classifiers.classifier import Classifier
from ctrl_rl.classifiers.folder import CLASSIFIER, DIAGRAM_FILE, REPORT_FILE
from ctrl_rl.classifiers.training import ClassifierFitting, FitPlan
from ctrl_rl.data import OfflineDataset, as_float
from ctrl_rl.errors import ConfigError
from ctrl_rl.files import write_text
from ctrl_rl.unfinished import unfinished

# Draws of the noise per calibration example: a few steady the temperature at little cost.
NOISE_DRAWS = 8
# Bound the memory of an evaluation pass; the figures do not depend on them.
EVALUATION_ROWS, EVALUATION_VALUES = 1024, 2**22


def fit_classifier(
    *, network: nn.Module, dataset: OfflineDataset, progress: bool = True, **settings: Any
) -> tuple[Classifier, CalibrationReport]:
    """Fits with AdamW and a cosine schedule, then fits the temperature.

    The result depends on the arguments only, bit for bit on a CPU. The global random state and
    `network`, which is copied, stay untouched.

    Args:
        network: Maps x [B, *shape] to logits [B, num_labels]; gives the initial weights.
        dataset: The labelled examples and their splits.
        progress: Whether to show a progress bar.
        **settings: Those of `FitPlan`.

    Returns:
        The frozen, calibrated classifier, and its figures on the report split.

    Raises:
        ConfigError: If two splits are the same, a number is out of range, the network does not
            fit the dataset or the fitted network is no better than chance.
        NonFiniteError: If the fit diverges.
    """
    plan = FitPlan(**settings)
    fitting = _prepare(network, dataset, plan)
    with _bar(fitting.total, progress=progress) as report:
        while fitting.done < fitting.total:
            loss = fitting.step()
            report(fitting.done, loss)
    return _calibrate(fitting.network, dataset, plan)


def run_classifier_fit(
    *,
    network: nn.Module,
    dataset: OfflineDataset,
    out: str | Path,
    progress: bool = True,
    **settings: Any,
) -> CalibrationReport:
    """Fits a classifier and writes it, its figures and its reliability diagram into a folder.

    The folder appears complete or not at all: `classifier.safetensors`, `classifier.json`,
    `report.json` and `reliability.png`. A fit that was stopped is resumed by the same call, and
    its result is bit for bit that of one that was not.

    Args:
        network: As for `fit_classifier`.
        dataset: As for `fit_classifier`.
        out: Folder to write. An earlier classifier there is replaced.
        progress: As for `fit_classifier`.
        **settings: Those of `FitPlan`.

    Returns:
        The figures on the report split.

    Raises:
        ConfigError: If `out` holds anything but a classifier, the fit was stopped with other
            settings, or as in `fit_classifier`.
        NonFiniteError: If the fit diverges.
        RunError: If `out` cannot be written, or another process writes it.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    plan = FitPlan(**settings)
    fitting = _prepare(network, dataset, plan)
    decides = {
        **asdict(plan),
        "dataset": dataset.fingerprint,
        "network": _fingerprint(network),
        "threads": torch.get_num_threads(),
    }
    with unfinished(Path(out), CLASSIFIER, decides) as work:
        with _bar(fitting.total, progress=progress) as report:
            work.finish(fitting, report)
        classifier, figures = _calibrate(fitting.network, dataset, plan)
        # Only the program's name: where it was installed is private.
        classifier.metadata["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        x, labels = dataset.split(plan.report_split)
        with work.result() as folder:
            classifier.save(folder)
            write_text(folder / REPORT_FILE, json.dumps(asdict(figures), indent=2) + "\n")
            reliability_diagram(
                folder / DIAGRAM_FILE,
                logits=_logits(classifier, x),
                labels=labels,
                temperature=figures.temperature,
                title=f"{type(network).__name__} on the {plan.report_split!r} split",
            )
    return figures


def _prepare(network: nn.Module, dataset: OfflineDataset, plan: FitPlan) -> ClassifierFitting:
    """The fit before its first update, of a copy of the network."""
    if len(set(plan.splits.values())) < len(plan.splits):
        raise ConfigError(
            f"train_split={plan.train_split!r}, calibration_split={plan.calibration_split!r} and "
            f"report_split={plan.report_split!r} must be three different splits, or the figures "
            f"would flatter: choose among {', '.join(dataset.splits)}"
        )
    parts = {name: dataset.split(split) for name, split in plan.splits.items()}
    network = copy.deepcopy(network).to(plan.device)
    _check_network(network, dataset)
    return ClassifierFitting(network, *parts["train"], dataset.num_labels, plan)


def _calibrate(
    network: nn.Module, dataset: OfflineDataset, plan: FitPlan
) -> tuple[Classifier, CalibrationReport]:
    """The classifier of a fitted network, and its figures."""
    classifier = Classifier(
        network=network,
        num_labels=dataset.num_labels,
        label_names=dataset.label_names,
        shape=dataset.shape,
    )
    calibration, report_on = (
        dataset.split(split) for split in (plan.calibration_split, plan.report_split)
    )
    generator = torch.Generator().manual_seed(plan.seed)
    noisy = [
        _logits(classifier, calibration[0], noise=plan.calibration_noise, generator=generator)
        for _ in range(NOISE_DRAWS)
    ]
    temperature = fit_temperature(torch.cat(noisy), calibration[1].repeat(NOISE_DRAWS))
    report = measure_calibration(
        logits=_logits(classifier, report_on[0]), labels=report_on[1], temperature=temperature
    )
    classifier.temperature.fill_(temperature)
    classifier.metadata = {
        "report": asdict(report),
        "splits": plan.splits,
        "dataset_fingerprint": dataset.fingerprint,
        "settings": plan.settings,
        "torch": torch.__version__,
    }
    return classifier, report


@contextmanager
def _bar(total: int, *, progress: bool) -> Iterator[Callable[[int, float], None]]:
    """A progress bar; the yielded function takes (finished updates, loss)."""
    columns = (
        TextColumn("Fitting the classifier"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("updates, loss {task.fields[loss]:.4f} nats,"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=total, loss=float("nan"))
        yield lambda done, loss: bar.update(task, completed=done, loss=loss)


def _fingerprint(network: nn.Module) -> str:
    """The class of a network and a hash of its weights."""
    weights = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in network.state_dict().items()
    }
    return f"{type(network).__name__} {hashlib.sha256(save(weights)).hexdigest()}"


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
