"""Environments and policies on which agents are tried."""

from collections.abc import Mapping

import torch
from exact_tasks import gaussian_oracle
from oracles import GaussianChainOracle
from torch import Tensor, nn

from ctrl_rl.agents.plan import TaskSpec
from ctrl_rl.conditions import label_counts
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.runs.build import build_policy
from ctrl_rl.runs.compose import compose
from ctrl_rl.runs.loaded import make_env


class StepShifts(DenoisingPolicy):
    """loc = prior_loc + shifts[label, k]: no parameter is shared by two steps."""

    def __init__(self, process: DenoisingProcess) -> None:
        super().__init__(process.kernel)
        (labels,) = label_counts(process.controls).values()
        self.shifts = nn.Parameter(torch.zeros(labels, process.num_steps, *process.shape))

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        (label,) = control.values()
        return prior_loc + self.shifts[label, step]


def make(task: str, num_envs: int, num_steps: int = 6, seed: int = 0) -> LatentEnv:
    words = [f"kernel.num_steps={num_steps}"]
    return make_env(task, num_envs=num_envs, seed=seed, overrides=words)


def oracles(process: DenoisingProcess) -> list[GaussianChainOracle]:
    (labels,) = label_counts(process.controls).values()
    return [gaussian_oracle(process, label) for label in range(labels)]


def task_of(process: DenoisingProcess) -> TaskSpec:
    return TaskSpec(shape=process.shape, num_steps=process.num_steps, controls=process.controls)


def noisy_drift(env: LatentEnv, task: str) -> DenoisingPolicy:
    """A network that steps share, moved off the prior."""
    config = compose("train", [f"env={task}", f"kernel.num_steps={env.process.num_steps}"])
    policy = build_policy(config, env.process)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy
