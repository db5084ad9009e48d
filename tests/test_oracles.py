"""The oracles agree with each other and with brute force."""

import numpy as np
import pytest
from oracles import GaussianChainOracle, fixed_scale_floor_1d, soft_values_1d


def affine(slope, offset):
    return lambda x: slope * x + offset


def affine_chain(*, steps, seed):
    """Return an oracle and the same one-dimensional chain as callables."""
    generator = np.random.default_rng(seed)
    slopes = generator.uniform(0.7, 1.1, steps + 1)
    offsets = generator.normal(0.0, 0.2, (steps + 1, 1))
    sigmas = generator.uniform(0.1, 0.6, steps)
    oracle = GaussianChainOracle(slopes, offsets, sigmas, [1.3], -0.4)
    means = [affine(slopes[k], offsets[k, 0]) for k in range(steps)]
    readout = affine(slopes[-1], offsets[-1, 0])
    return oracle, means, list(sigmas), affine(1.3, -0.4), readout


def log_sigmoid(x):
    """Log-probability of a class under a steep classifier with a bias."""
    return -np.logaddexp(0.0, -6.0 * (x - 1.0))


def test_value_weights_and_constants_of_a_chain_computed_by_hand():
    oracle = GaussianChainOracle([0.5, 2.0], [[1.0, 0.0], [0.0, 3.0]], [2.0], [1.0, -1.0], 0.25)

    np.testing.assert_allclose(oracle.value_weights, [[1.0, -1.0], [2.0, -2.0]])
    # c_1 = w.b_1 + const = -3 + 0.25; c_0 = a_1.b_0 + 4 |a_1|^2 / 2 + c_1 = 2 + 16 - 2.75.
    np.testing.assert_allclose(oracle.value_constants, [15.25, -2.75])
    np.testing.assert_allclose(oracle.optimal_shifts, [[8.0, -8.0]])
    assert oracle.optimal_soft_return == 15.25
    assert oracle.start_law_term == 1.0
    assert oracle.log_z == 16.25


def test_rolling_out_the_optimal_shifts_reaches_the_optimal_soft_return():
    oracle, means, sigmas, reward, readout = affine_chain(steps=5, seed=0)
    generator = np.random.default_rng(1)
    state = generator.standard_normal(20_000)
    kl = 0.0
    for mean, sigma, shift in zip(means, sigmas, oracle.optimal_shifts[:, 0], strict=True):
        state = mean(state) + shift + sigma * generator.standard_normal(len(state))
        kl += shift**2 / (2 * sigma**2)
    returns = reward(readout(state)) - kl

    error = returns.std() / np.sqrt(len(returns))
    assert abs(returns.mean() - oracle.optimal_soft_return) < 4 * error


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_dynamic_programming_equals_the_closed_form_for_affine_chains(steps):
    oracle, *chain = affine_chain(steps=steps, seed=steps)

    floor = fixed_scale_floor_1d(*chain)

    exact = oracle.value_weights * floor.grid + oracle.value_constants[:, None]
    np.testing.assert_allclose(floor.soft.values, exact, atol=1e-3)
    np.testing.assert_allclose(floor.values, exact, atol=1e-3)
    assert floor.soft.log_z == pytest.approx(oracle.log_z, abs=1e-3)
    assert floor.soft.start_value == pytest.approx(oracle.optimal_soft_return, abs=1e-3)
    assert floor.start_value == pytest.approx(oracle.optimal_soft_return, abs=1e-3)
    assert floor.gap == pytest.approx(oracle.start_law_term, abs=1e-3)


def test_log_z_of_a_nonlinear_chain_agrees_with_monte_carlo():
    means = [np.tanh, lambda x: 0.8 * x + 0.3 * np.sin(2 * x)]
    sigmas = [0.7, 0.4]
    generator = np.random.default_rng(2)
    state = generator.standard_normal(200_000)
    for mean, sigma in zip(means, sigmas, strict=True):
        state = mean(state) + sigma * generator.standard_normal(len(state))
    weights = np.exp(log_sigmoid(state))

    soft = soft_values_1d(means, sigmas, log_sigmoid, lambda x: x)

    error = weights.std() / np.sqrt(len(weights)) / weights.mean()
    assert abs(soft.log_z - np.log(weights.mean())) < 4 * error


def test_floor_lies_between_the_prior_and_the_optimum():
    means = [affine(0.9, 0.0)] * 6
    sigmas = [0.4] * 6

    floor = fixed_scale_floor_1d(means, sigmas, log_sigmoid, lambda x: x)

    # J of the unchanged prior is E[r]: the last state is Gaussian with a known variance.
    variance = 0.81**6 + 0.16 * sum(0.81**k for k in range(6))
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    prior_return = log_sigmoid(np.sqrt(variance) * nodes) @ weights / weights.sum()
    assert prior_return < floor.start_value < floor.soft.start_value < floor.soft.log_z
    assert floor.gap > 0
    assert (floor.values <= floor.soft.values + 1e-9).all()


def test_floor_of_one_step_agrees_with_direct_maximisation():
    def mixture(x):
        return np.logaddexp(-((x - 2) ** 2), -0.3 - ((x + 2) ** 2))

    floor = fixed_scale_floor_1d([affine(1.0, 0.0)], [0.8], mixture, lambda x: x)

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    actions = np.linspace(-6, 6, 4001)
    smoothed = mixture(actions[:, None] + 0.8 * nodes) @ weights / weights.sum()
    for state in (-1.5, -0.1, 0.0, 0.7, 3.0):
        direct = (smoothed - (actions - state) ** 2 / (2 * 0.64)).max()
        assert np.interp(state, floor.grid, floor.values[0]) == pytest.approx(direct, abs=1e-4)


def test_doubling_the_grid_changes_nothing_visible():
    means = [np.tanh, affine(0.9, 0.1)]

    coarse = fixed_scale_floor_1d(means, [0.5, 0.3], log_sigmoid, lambda x: x)
    fine = fixed_scale_floor_1d(means, [0.5, 0.3], log_sigmoid, lambda x: x, points=4001)

    assert coarse.gap == pytest.approx(fine.gap, abs=1e-4)


def test_misfitting_arguments_are_named():
    with pytest.raises(ValueError, match="slopes and offsets must have shapes"):
        GaussianChainOracle([1.0], [[0.0], [0.0]], [0.5], [1.0])
    with pytest.raises(ValueError, match="one sigma per mean"):
        soft_values_1d([np.tanh], [], log_sigmoid, lambda x: x)
    with pytest.raises(ValueError, match="reward must be finite"):
        soft_values_1d([np.tanh], [0.5], lambda x: np.full_like(x, np.nan), lambda x: x)
