"""Laws of the labels: ranges, frequencies, refusals."""

import pytest
import torch

from ctrl_rl.controls import Categorical, Continuous
from ctrl_rl.envs.control_laws import BalancedLaw, ControlLaw, FixedLaw, UniformLaw, WeightedLaw
from ctrl_rl.errors import ConfigError

THREE, NUMBER = Categorical.of(3), Continuous(-1.0, 2.0)


def draw(law: ControlLaw, n: int, num_labels: int, seed: int = 0) -> torch.Tensor:
    return law.draw(n, Categorical.of(num_labels), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("law", "probabilities"),
    [
        (UniformLaw(), [0.25] * 4),
        (BalancedLaw(), [0.25] * 4),
        (WeightedLaw(probabilities=[2, 0, 1, 5]), [0.25, 0.0, 0.125, 0.625]),
        (FixedLaw(label=2), [0.0, 0.0, 1.0, 0.0]),
    ],
)
def test_frequencies_are_the_probabilities(law: ControlLaw, probabilities: list[float]) -> None:
    n = 20_000
    counts = draw(law, n, 4).bincount(minlength=4) / n
    for count, p in zip(counts.tolist(), probabilities, strict=True):
        assert abs(count - p) <= 4 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("n", [1, 3, 4, 10, 64])
def test_balanced_law_differs_by_one_at_most(n: int) -> None:
    for seed in range(20):
        counts = draw(BalancedLaw(), n, 4, seed).bincount(minlength=4)
        assert counts.max() - counts.min() <= 1


def test_balanced_law_favours_no_position_and_no_label() -> None:
    rows = torch.stack([draw(BalancedLaw(), 6, 4, seed) for seed in range(4000)])
    for column in rows.T:  # each place is uniform over labels, the remainder's too
        counts = column.bincount(minlength=4) / len(column)
        assert (counts - 0.25).abs().max() < 4 * (0.25 * 0.75 / len(column)) ** 0.5


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: WeightedLaw(probabilities=[0, 0]), "not all 0"),
        (lambda: WeightedLaw(probabilities=[1, -1]), "must be >= 0"),
        (lambda: WeightedLaw(probabilities=[1, 1]).check("c", THREE), "give one per label"),
        (lambda: FixedLaw(label=3).check("c", THREE), "use 0 to 2"),
        (lambda: FixedLaw(label="any").check("c", THREE), "asks for nothing of c; use 0 to 2"),
        (lambda: FixedLaw(label=2.5).check("c", NUMBER), "numbers from -1 to 2"),
        (lambda: FixedLaw(label="any").check("c", NUMBER), "use a number from -1 to 2"),
        (lambda: WeightedLaw(probabilities=[1, 1]).check("c", NUMBER), "c is a number from -1"),
        (lambda: FixedLaw(label=-1).check("c", THREE), "use whole labels 0 to 2"),
    ],
)
def test_laws_that_do_not_fit_are_refused(make: object, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("law", [UniformLaw(), BalancedLaw()], ids=["uniform", "balanced"])
def test_numbers_are_uniform_on_the_interval(law: ControlLaw) -> None:
    n = 30_000
    values = law.draw(n, NUMBER, torch.Generator().manual_seed(0))
    assert values.dtype == torch.float32 and values.min() >= -1 and values.max() <= 2
    counts = torch.histc(values, 10, -1, 2) / n
    assert (counts - 0.1).abs().max() < 4 * (0.1 * 0.9 / n) ** 0.5
    # No order: a value says nothing of the next one.
    assert abs(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]) < 4 / n**0.5


def test_the_balanced_law_draws_one_number_from_each_part() -> None:
    for seed in range(20):
        values = BalancedLaw().draw(16, NUMBER, torch.Generator().manual_seed(seed))
        parts = ((values + 1) / 3 * 16).long().clamp(max=15)
        assert sorted(parts.tolist()) == list(range(16))


def test_a_fixed_number_is_that_number() -> None:
    assert FixedLaw(label=0.5).draw(3, NUMBER, torch.Generator()).tolist() == [0.5] * 3
    assert FixedLaw(label="b").draw(2, Categorical(("a", "b")), torch.Generator()).tolist() == [
        1,
        1,
    ]
