"""Averages, intervals and curves of a report against closed forms."""

import numpy as np
import pytest

from ctrl_rl.benchmark.pictures import pareto_front, running_mean
from ctrl_rl.benchmark.statistics import interquartile_interval, interquartile_mean


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        (range(1, 9), 4.5),  # of 3, 4, 5, 6
        ([7, 1, 5, 3, 8, 2, 6, 4], 4.5),
        ([-1e9, 2, 3, 4, 1e9], 3.0),  # one of five is cut at each end
        ([1, 2, 6], 3.0),  # fewer than four: nothing is cut
        ([0.25], 0.25),
    ],
)
def test_interquartile_mean(scores, mean):
    assert interquartile_mean(list(scores)) == mean


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = interquartile_interval([generator.normal(3.0, 1.0, 25)], confidence=0.9)
        covered += low <= 3.0 <= high
    # Binomial(200, 0.9) has a standard deviation of 4; percentile intervals fall a little short.
    assert 180 - 20 <= covered <= 180 + 12


def test_interval_is_stratified():
    # Without strata resamples would mix the tasks, and their mean would move between 0 and 10.
    assert interquartile_interval([[0.0] * 4, [10.0] * 4]) == (5.0, 5.0)
    of_middle_six = pytest.approx((20 / 3, 20 / 3))  # two of 0 and four of 10
    assert interquartile_interval([[0.0] * 4, [10.0] * 6]) == of_middle_six


def test_interval_of_one_seed_is_unknown():
    assert interquartile_interval([[1.0]]) is None
    assert interquartile_interval([[1.0, 2.0], [3.0]]) is None
    assert interquartile_interval([]) is None
    assert interquartile_interval([[1.0, 2.0]]) == interquartile_interval([[1.0, 2.0]])


def test_running_mean():
    values = np.asarray([1.0, 3.0, 5.0, 7.0])
    assert running_mean(values, 1).tolist() == values.tolist()
    assert running_mean(values, 2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert running_mean(values, 9).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_pareto_front():
    points = [(2.0, 1.0), (0.0, 0.0), (1.0, 2.0), (3.0, 3.0), (1.0, 1.0), (3.5, 3.0)]
    assert pareto_front(points) == [(0.0, 0.0), (1.0, 2.0), (3.0, 3.0)]
