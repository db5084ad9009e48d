"""One optimizer step: AdamW with a rate per parameter group, clipping, schedule, moving average."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.plan import in_force
from ctrl_rl.errors import ConfigError, NonFiniteError, check_choice, did_you_mean
from ctrl_rl.networks.fitting import load_optimizer_state, optimizer_state, without_prefix
from ctrl_rl.policies import DenoisingPolicy

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


AUTO = "auto"  # find the microbatch that fits by trial
_ADVICE = "try a lower trainer.learning_rate"


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of training; `configs/trainer/default.yaml` explains each.

    Raises:
        ConfigError: a value out of range.
    """

    updates: int = 300
    denoiser_calls: int | None = None
    batch_size: int = 64
    microbatch: int | str | None = None
    learning_rate: dict[str, float] = field(default_factory=lambda: {"network": 1e-3})
    schedule: str = "cosine"
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    checkpoint_every: int = 50
    keep_checkpoints: int = 3
    log_z_samples: int = 512

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        counts = ("updates", "batch_size", "checkpoint_every", "keep_checkpoints", "log_z_samples")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}={getattr(self, name)} must be 1 or more")
        wrong = isinstance(self.microbatch, str) and self.microbatch != AUTO
        if wrong or (isinstance(self.microbatch, int) and self.microbatch < 1):
            raise ConfigError(
                f"trainer.microbatch={self.microbatch} must be 1 or more, {AUTO} or null"
            )
        if self.denoiser_calls is not None and self.denoiser_calls < 1:
            raise ConfigError(f"trainer.denoiser_calls={self.denoiser_calls} must be 1 or more")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"trainer.{name}={getattr(self, name)} must be 0 or more")
        for name, rate in self.learning_rate.items():
            if not 0 < rate < math.inf:
                raise ConfigError(f"trainer.learning_rate.{name}={rate} must be > 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"trainer.betas={list(self.betas)} must be in [0, 1)")
        check_choice("trainer.schedule", self.schedule, SCHEDULES)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"trainer.ema_decay={self.ema_decay} is not in (0, 1); or use null")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(f"trainer.max_grad_norm={self.max_grad_norm} must be > 0, or null")

    def within_budget(self, calls_per_update: Mapping[float, int]) -> "TrainerConfig":
        """The same with the updates that `denoiser_calls` pays for; unchanged without a budget.

        Args:
            calls_per_update: evaluations of prior and policy in an update, counted in samples, by
                the share of training from which they hold.

        Raises:
            ConfigError: the budget does not pay for one update.
        """
        if self.denoiser_calls is None:
            return self
        most = self.denoiser_calls // min(calls_per_update.values())
        price = partial(_price, calls_per_update=calls_per_update)
        updates = bisect_right(range(1, most + 1), self.denoiser_calls, key=price)
        if updates == 0:
            raise ConfigError(
                f"trainer.denoiser_calls={self.denoiser_calls} does not pay for one update, which "
                f"takes {_price(1, calls_per_update)}; give more, or a smaller trainer.batch_size"
            )
        return replace(self, updates=updates)

    def rate_factor(self, update: int) -> float:
        """Factor on the learning rates at an update, 0 .. updates - 1."""
        warm = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        return warm * SCHEDULES[self.schedule](update / self.updates)


def _price(updates: int, calls_per_update: Mapping[float, int]) -> int:
    """Calls of a number of updates; more updates never cost less."""
    done = (update / updates for update in range(updates))
    return sum(in_force(calls_per_update, progress) for progress in done)


class Learner:
    """Policy, agent and optimizer, and the state that a checkpoint must hold.

    Args:
        policy: to train.
        agent: its own parameters (critics and the like) are trained too.
        config: settings.

    Raises:
        ConfigError: a parameter group without a learning rate.
    """

    def __init__(self, policy: DenoisingPolicy, agent: Agent, config: TrainerConfig) -> None:
        self.policy, self.agent, self.config = policy, agent, config
        groups = {**policy.parameter_groups(), **agent.parameter_groups()}
        groups = {name: parameters for name, parameters in groups.items() if parameters}
        for name in groups:
            if name not in config.learning_rate:
                raise ConfigError(
                    f"no trainer.learning_rate.{name} for the parameters of that name; "
                    f"{did_you_mean(name, config.learning_rate)}"
                )
        self.rates = [config.learning_rate[name] for name in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()],
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
        )
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            averaging = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(policy, multi_avg_fn=averaging)

    @property
    def result(self) -> DenoisingPolicy:
        """The policy to evaluate: the moving average where there is one."""
        averaged = self.policy if self.average is None else self.average.module
        assert isinstance(averaged, DenoisingPolicy)
        return averaged

    def backward(self, losses: TensorDict) -> TensorDict:
        """Differentiate the sum of all `loss_*`; gradients add up until `step`.

        Args:
            losses: what `Agent.loss` gave.

        Returns:
            The losses without their graph.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        named = {str(k): value for k, value in losses.items() if str(k).startswith("loss_")}
        if not named:
            raise ConfigError("the agent gave no loss; name at least one of its results loss_…")
        for name, value in named.items():
            if not torch.isfinite(value):
                raise NonFiniteError(f"{name} is {value.item()}; {_ADVICE}")
        torch.stack(list(named.values())).sum().backward()
        return losses.detach()

    def step(self, update: int) -> dict[str, float]:
        """Make one optimizer step with the gradients so far, and clear them.

        Args:
            update: number of finished updates, for the schedule.

        Returns:
            `grad_norm` before clipping and `learning_rate_factor`.

        Raises:
            NonFiniteError: a gradient is not finite; no parameter was touched.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient's norm is {norm.item()}; {_ADVICE}")
        factor = self.config.rate_factor(update)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.policy)
        return {"grad_norm": norm.item(), "learning_rate_factor": factor}

    def state(self) -> dict[str, Tensor]:
        """All tensors but the policy's, by dotted names."""
        state = optimizer_state(self.optimizer)
        state |= {f"agent.{name}": value for name, value in self.agent.state_dict().items()}
        if self.average is not None:
            averaged = self.average.state_dict()
            state |= {f"average.{name}": value for name, value in averaged.items()}
        return state

    def load(self, policy: dict[str, Tensor], state: dict[str, Tensor], update: int) -> None:
        """Load the policy's weights and what `state` gave after an update.

        Raises:
            ValueError: the optimizer's state is missing, or of other parameters.
        """
        self.policy.load_state_dict(policy)
        self.agent.load_state_dict(without_prefix(state, "agent."))
        if self.average is not None:
            self.average.load_state_dict(without_prefix(state, "average."))
        if update > 0 and not without_prefix(state, "optimizer."):
            raise ValueError("the optimizer's state is missing")
        load_optimizer_state(self.optimizer, state)
