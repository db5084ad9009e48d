"""Temperature scaling and calibration figures.

An over-confident classifier is nearly a step function of x: its log-probability has no useful
gradient. One scalar, fitted on a separate split, repairs most of that without changing any
prediction (Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.optimize import brentq
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from ctrl_rl.errors import ConfigError, NonFiniteError

NUM_BINS = 15
"""Equal confidence bins of the calibration error (Guo et al. 2017, table 1)."""

# Before and after: vermilion and blue of Okabe & Ito 2008, which colour-blind readers tell apart.
COLOURS = ("#D55E00", "#0072B2")


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """Figures of one classifier on a split used neither to fit nor to calibrate it.

    "Before" is at temperature 1 and "after" at the fitted temperature; accuracy and F1 are the
    same at both.

    Attributes:
        temperature: The fitted temperature.
        accuracy: Share of correct predictions, in [0, 1].
        macro_f1: F1 averaged over labels, in [0, 1].
        nll_before: Mean negative log-likelihood, nats per example.
        nll_after: The same, after temperature scaling.
        ece_before: Expected calibration error (l1, 15 bins), in [0, 1].
        ece_after: The same, after temperature scaling.
        num_examples: Number of examples measured.
    """

    temperature: float
    accuracy: float
    macro_f1: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    num_examples: int


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Finds the temperature T that minimises the likelihood loss of softmax(logits / T).

    The loss is convex in b = 1 / T with slope mean(E_softmax(b z)[z] - z_label), which rises with
    b. A finite optimum therefore exists exactly when the slope is negative at b = 0 and positive
    as b grows, and is the root in between; no search bounds to guess.

    Args:
        logits: [N, num_labels], any floating dtype; computed in float64.
        labels: int64 [N].

    Returns:
        T > 0. It is 1, with a warning, when every example is classified correctly: the loss then
        keeps falling as T shrinks, which is no evidence for a sharper reward.

    Raises:
        NonFiniteError: If a logit is not finite.
        ConfigError: If the logits predict the labels no better than chance: then no positive
            temperature is best.
    """
    logits = logits.detach().double()
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            "logits hold NaN or infinite values: the fit diverged, so lower its learning_rate"
        )
    of_label = logits.gather(1, labels[:, None]).mean()

    def slope(inverse_temperature: float) -> float:
        probabilities = torch.softmax(inverse_temperature * logits, dim=1)
        return ((probabilities * logits).sum(1).mean() - of_label).item()

    if slope(0) >= 0:
        raise ConfigError(
            "the classifier is no better than chance on the calibration split, so no temperature "
            "can calibrate it: check the labels, or fit for more epochs"
        )
    if torch.equal(logits.argmax(1), labels):
        warnings.warn(
            f"all {len(labels)} calibration examples are classified right, so the likelihood has "
            "no finite best temperature; it stays 1. Use a larger calibration split.",
            stacklevel=2,
        )
        return 1.0
    upper = 1.0
    while slope(upper) <= 0:
        upper *= 2
    return 1 / brentq(slope, 0.0, upper)


def measure_calibration(*, logits: Tensor, labels: Tensor, temperature: float) -> CalibrationReport:
    """Measures a classifier before and after temperature scaling.

    Args:
        logits: Before the temperature, float [N, num_labels].
        labels: int64 [N].
        temperature: The temperature fitted on other data.

    Returns:
        The figures, which say nothing about generalisation unless the examples are new.
    """
    num_labels = logits.shape[1]
    loss = torch.nn.functional.cross_entropy
    return CalibrationReport(
        temperature=temperature,
        accuracy=multiclass_accuracy(logits, labels, num_labels, average="micro").item(),
        macro_f1=multiclass_f1_score(logits, labels, num_labels, average="macro").item(),
        nll_before=loss(logits, labels).item(),
        nll_after=loss(logits / temperature, labels).item(),
        ece_before=_expected_calibration_error(logits, labels),
        ece_after=_expected_calibration_error(logits / temperature, labels),
        num_examples=len(labels),
    )


def reliability_diagram(
    path: str | Path, *, logits: Tensor, labels: Tensor, temperature: float, title: str
) -> None:
    """Draws accuracy against confidence, before and after, above the confidence histogram.

    Args:
        path: Image to write; the ending names its format.
        logits: Before the temperature, float [N, num_labels], on the CPU.
        labels: int64 [N], on the CPU.
        temperature: The fitted temperature.
        title: First line of the title.
    """
    figure = Figure(figsize=(8, 8), layout="constrained")
    figure.suptitle(f"{title}\n{len(labels)} examples, {NUM_BINS} bins, 95 % Wilson intervals")
    curves, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    curves.plot((0, 1), (0, 1), color="0.6", linestyle="--", label="perfectly calibrated")
    edges = np.linspace(0, 1, NUM_BINS + 1)
    scaled = (logits, logits / temperature)
    names = ("before (T = 1)", f"after (T = {temperature:.3g})")
    for name, those, colour, marker in zip(names, scaled, COLOURS, "os", strict=True):
        error = _expected_calibration_error(those, labels)
        confidence, accuracy, interval = _reliability(those, labels, edges)
        curves.errorbar(
            confidence,
            accuracy,
            yerr=interval,
            color=colour,
            marker=marker,
            linestyle="",
            capsize=3,
            label=f"{name}: calibration error {error:.1%}",
        )
    histogram.hist([_confidences(those).numpy() for those in scaled], bins=edges, color=COLOURS)
    for bars in histogram.containers:
        histogram.bar_label(
            bars,
            fmt=lambda count: f"{count:.0f}" if count else "",
            fontsize=8,
            rotation=90,
            padding=2,
        )
    # Most examples sit in the last bin; a linear axis would hide all the others.
    histogram.set_yscale("symlog", linthresh=1)
    histogram.set_ylim(0, 10 * len(labels))
    histogram.set(xlabel="Confidence (largest probability)", ylabel="Examples in the bin")
    curves.set(ylabel="Accuracy in the bin", xlim=(0, 1), ylim=(-0.02, 1.02))
    # Above the axes: every corner within them may hold a point.
    curves.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
    curves.xaxis.set_major_formatter(PercentFormatter(1))
    curves.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (curves, histogram):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)


def _reliability(
    logits: Tensor, labels: Tensor, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence [m], accuracy [m] and the interval below and above it [2, m], by bin.

    Empty bins are left out. The intervals are Wilson's: a bin often holds one or two examples.
    """
    confidences = _confidences(logits).numpy()
    right = (logits.argmax(1) == labels).numpy()
    counts, _ = np.histogram(confidences, edges)
    filled = counts > 0
    counts = counts[filled]
    hits = np.histogram(confidences[right], edges)[0][filled]
    sums = np.histogram(confidences, edges, weights=confidences)[0][filled]
    accuracy = hits / counts
    bounds = np.array(
        [
            binomtest(int(hit), int(count)).proportion_ci(0.95, method="wilson")
            for hit, count in zip(hits, counts, strict=True)
        ]
    ).T
    return sums / counts, accuracy, np.abs(bounds - accuracy)


def _confidences(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=1).amax(dim=1)


def _expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    probabilities = torch.softmax(logits, dim=1)
    error = multiclass_calibration_error(
        probabilities, labels, logits.shape[1], n_bins=NUM_BINS, norm="l1"
    )
    return error.item()
