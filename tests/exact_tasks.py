"""The gaussian and mixture1d tasks as the oracles see them, and policies that solve them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from oracles import GaussianChainOracle
from torch import Tensor

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.policies import DenoisingPolicy


@torch.no_grad()
def prior_means(process: DenoisingProcess) -> list[Callable[[np.ndarray], np.ndarray]]:
    """mean_k as functions of one-dimensional points, K steps and the read-out."""

    def mean_at(k: int) -> Callable[[np.ndarray], np.ndarray]:
        def mean(points: np.ndarray) -> np.ndarray:
            x = torch.as_tensor(np.ravel(points)).float()[:, None]
            step = torch.full((len(x),), k)
            return process.prior_loc(x, step, {})[:, 0].double().numpy().reshape(np.shape(points))

        return mean

    return [mean_at(k) for k in range(process.num_steps + 1)]


def reward_of(process: DenoisingProcess, name: str, label: int) -> Callable[..., np.ndarray]:
    """The reward of one label as a function of one-dimensional samples, nats."""

    def reward(points: np.ndarray) -> np.ndarray:
        sample = torch.as_tensor(np.ravel(points)).float()[:, None]
        control = {name: torch.full((len(sample),), label)}
        return process.reward(sample, control).double().numpy().reshape(np.shape(points))

    return reward


def scales(process: DenoisingProcess) -> np.ndarray:
    return process.kernel.scale[: process.num_steps].double().numpy()


@torch.no_grad()
def gaussian_oracle(process: DenoisingProcess, asked: float) -> GaussianChainOracle:
    """Closed form of a gaussian task: chain and reward are affine, read off at 0 and at 1."""
    zero = torch.zeros(1, *process.shape)
    slopes, offsets = [], []
    for k in range(process.num_steps + 1):
        step = torch.tensor([k])
        offset = process.prior_loc(zero, step, {})
        slopes.append(float((process.prior_loc(zero + 1, step, {}) - offset)[0, 0]))
        offsets.append(offset[0].double().numpy())
    (name,) = process.controls
    points = torch.cat([zero, torch.eye(*process.shape)])
    values = process.check_control({name: asked}, len(points))
    constant, *at_one = process.reward(points, values).double().numpy()
    weights = np.asarray(at_one) - constant
    return GaussianChainOracle(slopes, offsets, scales(process), weights, constant)


class ShiftPolicy(DenoisingPolicy):
    """loc = prior_loc + factor * shifts[label, k]: for factor 1 the gaussian task's optimum."""

    def __init__(self, process: DenoisingProcess, factor: float = 1.0) -> None:
        super().__init__(process.kernel)
        (self.control, kind), *_ = process.controls.items()
        oracles = [gaussian_oracle(process, label) for label in range(int(kind.size))]
        shifts = np.stack([oracle.optimal_shifts for oracle in oracles])
        self.shifts = factor * torch.as_tensor(shifts).float()

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        return prior_loc + self.shifts[control[self.control], step]
