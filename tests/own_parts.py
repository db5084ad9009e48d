"""Parts of env=gaussian made in Python, and runs of them."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from running import SMALL

import ctrl_rl
from ctrl_rl.agents.ctrl import Ctrl
from ctrl_rl.kernels import ddpm_kernel
from ctrl_rl.policies import DriftPolicy
from ctrl_rl.priors import gaussian_prior
from ctrl_rl.rewards import LinearReward
from ctrl_rl.runs.compose import compose

OVERRIDES = [word for word in SMALL if not word.startswith(("env=", "trainer.updates="))]
CONFIG = compose("train", ["env=gaussian"])
SCHEDULER = dict(CONFIG.prior.scheduler)
GAUSSIAN = partial(
    gaussian_prior, mean=list(CONFIG.prior.mean), std=CONFIG.prior.std, scheduler=SCHEDULER
)
LINEAR = partial(LinearReward, weights=[list(each) for each in CONFIG.reward.weights])
STEPS = partial(ddpm_kernel, num_steps=8)
RATES = [f"trainer.learning_rate={{{','.join(f'{k}: 0.01' for k in ('network', 'embedding'))}}}"]
MAKERS = {"prior": GAUSSIAN, "reward": LINEAR, "kernel": STEPS, "policy": DriftPolicy}


def own(root: Path, **named: Any) -> ctrl_rl.LoadedRun:
    given = {"agent": Ctrl, **MAKERS, "updates": 12, "overrides": [*OVERRIDES, *RATES]}
    return ctrl_rl.train(**{**given, "root": root, "quiet": True, **named})


def ready() -> dict[str, Any]:
    """The same parts as objects; the policy has the weights that the config's seed gives."""
    prior = GAUSSIAN()
    kernel, reward = STEPS(scheduler_config=prior.scheduler_config), LINEAR()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = DriftPolicy(prior=prior, kernel=kernel, controls=reward.controls)
    return {"prior": prior, "kernel": kernel, "reward": reward, "policy": policy, "agent": Ctrl()}
