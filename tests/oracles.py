"""Exact answers for small denoising MDPs, in float64 NumPy and independent of the library.

A chain starts at x_0 ~ N(0, I), takes K steps x_{k+1} ~ N(mean_k(x_k), sigma_k^2 I) and ends with
the reward of readout(x_K), in nats. Soft values are v_k(x) = log E[e^reward | x_k = x] under the
prior; log Z = log E[e^{v_0(x_0)}].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

# Rows of the (state, action) table held at once: bounds the memory of the maximisation.
_ROWS = 128


@dataclass(frozen=True, eq=False)
class GaussianChainOracle:
    """Closed form for an affine chain with a linear reward.

    mean_k(x) = slopes[k] x + offsets[k] for k < K, sample = slopes[K] x_K + offsets[K], and
    reward = reward_weights . sample + reward_constant. Then v_k(x) = a_k . x + c_k.

    Nested sequences are converted to float64 arrays.

    Attributes:
        slopes: shape [K + 1].
        offsets: shape [K + 1, d].
        sigmas: standard deviations of the steps, shape [K].
        reward_weights: shape [d], nats per unit of the sample.
        reward_constant: nats.
    """

    slopes: Array
    offsets: Array
    sigmas: Array
    reward_weights: Array
    reward_constant: float = 0.0

    def __post_init__(self) -> None:
        """Convert to float64 arrays and check the shapes.

        Raises:
            ValueError: If the shapes do not fit each other.
        """
        for name in ("slopes", "offsets", "sigmas", "reward_weights"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        steps, dimension = np.size(self.sigmas), np.size(self.reward_weights)
        shapes = (np.shape(self.slopes), np.shape(self.offsets))
        if shapes != ((steps + 1,), (steps + 1, dimension)):
            raise ValueError(
                f"slopes and offsets must have shapes {(steps + 1,)} and {(steps + 1, dimension)} "
                f"for {steps} sigmas and {dimension} reward weights, got {shapes[0]}, {shapes[1]}"
            )

    @property
    def value_weights(self) -> Array:
        """Gradients a_k of the soft values, shape [K + 1, d]."""
        # a_k = slopes[k] a_{k+1}: a product of all later slopes, the read-out's included.
        products = np.cumprod(self.slopes[::-1])[::-1]
        return products[:, None] * self.reward_weights

    @property
    def value_constants(self) -> Array:
        """Constants c_k of the soft values, shape [K + 1], nats."""
        following = np.concatenate([self.value_weights[1:], [self.reward_weights]])
        drift = (self.offsets * following).sum(axis=1)
        noise = np.append(self.sigmas**2 * (following[:-1] ** 2).sum(axis=1) / 2, 0.0)
        return self.reward_constant + np.cumsum((drift + noise)[::-1])[::-1]

    @property
    def optimal_shifts(self) -> Array:
        """Shift of each step's mean under the optimal policy, sigma_k^2 a_{k+1}, shape [K, d]."""
        return self.sigmas[:, None] ** 2 * self.value_weights[1:]

    @property
    def optimal_soft_return(self) -> float:
        """E[v_0(x_0)] = c_0: the largest J that any policy reaches from x_0 ~ N(0, I), nats."""
        return float(self.value_constants[0])

    @property
    def start_law_term(self) -> float:
        """Part of log Z that no policy reaches without choosing x_0, |a_0|^2 / 2, nats."""
        return float((self.value_weights[0] ** 2).sum() / 2)

    @property
    def log_z(self) -> float:
        """Log partition function log E[e^reward] under the prior, nats."""
        return self.optimal_soft_return + self.start_law_term


@dataclass(frozen=True, eq=False)
class SoftValues1D:
    """Soft values of a one-dimensional chain.

    Attributes:
        grid: uniform states, shape [G].
        values: v_k on the grid, shape [K + 1, G], nats.
        start_value: E[v_0(x_0)], the soft return of the optimal (not only Gaussian) policy, nats.
        log_z: log E[e^{v_0(x_0)}], nats.
    """

    grid: Array
    values: Array
    start_value: float
    log_z: float


@dataclass(frozen=True, eq=False)
class FixedScaleFloor1D:
    """What the best Gaussian policy with the prior's sigmas reaches on a one-dimensional chain.

    Attributes:
        grid: uniform states, shape [G].
        values: best value-to-go of such policies, shape [K + 1, G], nats.
        start_value: E[V_0(x_0)], the best soft return of such policies, nats.
        soft: soft values of the same chain.
        gap: log Z - start_value, the smallest gap of such policies, nats.
    """

    grid: Array
    values: Array
    start_value: float
    soft: SoftValues1D
    gap: float


def soft_values_1d(
    means: Sequence[Function],
    sigmas: Sequence[float],
    reward: Function,
    readout: Function,
    *,
    half_width: float = 10.0,
    points: int = 2001,
) -> SoftValues1D:
    """Compute v_k(x) = log E_{N(mean_k(x), sigma_k^2)}[e^{v_{k+1}}] by dynamic programming.

    Beyond the grid the values continue linearly with the slope of its end. The quadrature reaches
    10 sigma_k, enough while |v'| sigma_k (and |v_0'| for the start) stays below about 5.

    Args:
        means: mean_k for k = 0..K-1; arrays of any shape in, same shape out.
        sigmas: sigma_k > 0, one per mean.
        reward: reward of samples, nats.
        readout: sample of a final state x_K.
        half_width: the grid spans [-half_width, half_width].
        points: grid points.

    Raises:
        ValueError: If the numbers of means and sigmas differ, or a reward is not finite.
    """
    grid, values = _start(means, sigmas, reward, readout, half_width, points)
    nodes, weights = _normal_quadrature()
    for mean, sigma in zip(reversed(means), reversed(sigmas), strict=True):
        following = _interpolate(values[0], grid, mean(grid)[:, None] + sigma * nodes)
        values.insert(0, _log_expectation(following, weights))
    start = _interpolate(values[0], grid, nodes)
    return SoftValues1D(
        grid, np.stack(values), float(start @ weights), float(_log_expectation(start, weights))
    )


def fixed_scale_floor_1d(
    means: Sequence[Function],
    sigmas: Sequence[float],
    reward: Function,
    readout: Function,
    *,
    half_width: float = 10.0,
    points: int = 2001,
) -> FixedScaleFloor1D:
    """Compute the best value of Gaussian policies that keep sigma_k and choose the mean only.

    V_k(x) = max_m E_{N(m, sigma_k^2)}[V_{k+1}] - (m - mean_k(x))^2 / (2 sigma_k^2), starting from
    V_K = v_K. Arguments and errors are those of `soft_values_1d`.
    """
    soft = soft_values_1d(means, sigmas, reward, readout, half_width=half_width, points=points)
    grid, values = _start(means, sigmas, reward, readout, half_width, points)
    nodes, weights = _normal_quadrature()
    for mean, sigma in zip(reversed(means), reversed(sigmas), strict=True):
        smoothed = _interpolate(values[0], grid, grid[:, None] + sigma * nodes) @ weights
        values.insert(0, _best_shift(smoothed, grid, mean(grid), sigma))
    start_value = float(_interpolate(values[0], grid, nodes) @ weights)
    return FixedScaleFloor1D(grid, np.stack(values), start_value, soft, soft.log_z - start_value)


def _start(
    means: Sequence[Function],
    sigmas: Sequence[float],
    reward: Function,
    readout: Function,
    half_width: float,
    points: int,
) -> tuple[Array, list[Array]]:
    if len(means) != len(sigmas):
        raise ValueError(f"need one sigma per mean, got {len(sigmas)} and {len(means)}")
    grid = np.linspace(-half_width, half_width, points)
    final = np.asarray(reward(readout(grid)), dtype=np.float64)
    if not np.isfinite(final).all():
        raise ValueError("reward must be finite on the whole grid")
    return grid, [final]


def _normal_quadrature() -> tuple[Array, Array]:
    """Return nodes and weights of E[f(z)], z ~ N(0, 1).

    The trapezoidal rule is as exact as Gauss-Hermite for smooth f (its error is of the order of
    e^{-2 pi^2 / spacing^2}), and unlike it keeps its accuracy at the kinks that a maximum leaves.
    """
    nodes = np.linspace(-10.0, 10.0, 201)
    weights = np.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


def _log_expectation(values: Array, weights: Array) -> Array:
    largest = values.max(axis=-1)
    result: Array = largest + np.log(np.exp(values - largest[..., None]) @ weights)
    return result


def _interpolate(values: Array, grid: Array, at: Array) -> Array:
    """Evaluate values [G] on the uniform grid at any points: cubic inside, linear outside."""
    spacing = grid[1] - grid[0]
    slopes = np.gradient(values, spacing, edge_order=2)
    inside = np.clip(at, grid[0], grid[-1])
    position = (inside - grid[0]) / spacing
    left = np.minimum(position.astype(np.intp), len(grid) - 2)
    t = position - left
    rise = values[1:] - values[:-1]
    # Cubic Hermite basis around the chord: exact for quadratics.
    bend_left = spacing * slopes[:-1] - rise
    bend_right = rise - spacing * slopes[1:]
    cubic: Array = (
        values[left]
        + t * rise[left]
        + t * (1 - t) * ((1 - t) * bend_left[left] + t * bend_right[left])
    )
    beyond: Array = (at - inside) * np.where(at > inside, slopes[-1], slopes[0])
    return cubic + beyond


def _best_shift(smoothed: Array, grid: Array, mean: Array, sigma: float) -> Array:
    """Maximise smoothed(m) - (m - mean)^2 / (2 sigma^2) over m for each entry of mean."""
    best = np.empty_like(mean)
    for rows in (slice(i, i + _ROWS) for i in range(0, len(mean), _ROWS)):
        centre = mean[rows, None]
        objective = smoothed - (grid - centre) ** 2 / (2 * sigma**2)
        # A parabola through the best point and its neighbours. With the best point at the end of
        # the grid, it reaches beyond, which continues a linear value exactly.
        index = np.clip(objective.argmax(axis=1), 1, len(grid) - 2)
        row = np.arange(len(index))
        before, peak, after = (objective[row, index + step] for step in (-1, 0, 1))
        curvature = before - 2 * peak + after
        curvature[curvature >= 0] = -np.inf  # no maximum of the parabola: no refinement
        refined = peak - (after - before) ** 2 / (8 * curvature)
        best[rows] = np.maximum(objective.max(axis=1), refined)
    return best


def chain_marginal(kernel: Any, denoiser: Any) -> tuple[float, float]:
    """Mean and variance of a one-dimensional chain from N(0, 1) with a Gaussian's denoiser.

    Every step is affine with it, so that two points of the latent give each.
    """
    points = torch.tensor([[0.0], [1.0]])
    mean, variance = 0.0, 1.0
    for k, t in enumerate(kernel.timesteps):
        at = kernel.mean(points, denoiser(points, t.expand(2)), torch.tensor([k, k]))
        offset, slope = float(at[0]), float(at[1] - at[0])
        mean = slope * mean + offset
        variance = slope**2 * variance + float(kernel.scale[k]) ** 2
    return mean, variance
