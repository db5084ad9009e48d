"""Temperatures are recovered, and calibration figures agree with those worked out by hand."""

import pytest
import torch
from torch import Tensor, nn

from ctrl_rl.classifiers.calibration import fit_temperature, measure_calibration
from ctrl_rl.errors import ConfigError, NonFiniteError


def over_confident(scale: float, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Labels drawn from softmax(z), and the logits scale * z, whose best temperature is scale."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return scale * logits, labels


def test_temperature_is_recovered() -> None:
    assert fit_temperature(*over_confident(3)) == pytest.approx(3, rel=0.05)
    assert fit_temperature(*over_confident(0.1)) == pytest.approx(0.1, rel=0.05)


def test_temperature_is_the_minimum() -> None:
    logits, labels = over_confident(3, count=200)
    best = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        return nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    assert loss(best) < min(loss(best * 0.999), loss(best * 1.001))


def test_scaling_repairs_over_confident_logits() -> None:
    logits, labels = over_confident(3)
    temperature = fit_temperature(logits[::2], labels[::2])
    report = measure_calibration(logits=logits[1::2], labels=labels[1::2], temperature=temperature)
    assert report.nll_after < report.nll_before and report.ece_after < report.ece_before / 5
    assert report.num_examples == 10_000


def test_report_agrees_with_figures_worked_out_by_hand() -> None:
    # Confidence 0.9 everywhere, right on 3 of 4: ECE = 0.9 - 0.75; F1 = (0.8 + 2/3) / 2.
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]).log()
    report = measure_calibration(logits=logits, labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
    assert report.accuracy == 0.75
    assert report.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert report.ece_before == report.ece_after == pytest.approx(0.15, abs=1e-6)
    log = torch.tensor([0.9, 0.9, 0.1, 0.9]).log()
    assert report.nll_before == pytest.approx(-log.mean().item(), rel=1e-6)


def test_temperature_stays_1_when_nothing_is_wrong() -> None:
    labels = torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="no finite best temperature"):
        assert fit_temperature(torch.eye(3), labels) == 1


def test_hopeless_logits_are_refused() -> None:
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match="no better than chance"):
        fit_temperature(-torch.eye(3), labels)
    with pytest.raises(NonFiniteError, match="learning_rate"):
        fit_temperature(torch.full((3, 3), float("nan")), labels)
