"""The training loop: rollout, loss, one optimizer step; it knows only the contracts."""

import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import ConfigError, CtrlError, NonFiniteError, did_you_mean
from ctrl_rl.interrupts import stop_on_interrupt
from ctrl_rl.learner import Learner, TrainerConfig
from ctrl_rl.policies import DenoisingPolicy
from ctrl_rl.rollouts import check_invariants, rollout
from ctrl_rl.runs import Checkpoint, Run
from ctrl_rl.soft_returns import episode_kl, episode_reward


class Interrupted(CtrlError):
    """The user pressed Ctrl-C; the run is saved."""


class Trainer:
    """Trains a policy in an env with an agent's losses, into a run folder.

    Args:
        env: where episodes happen; its generator is the only source of randomness.
        policy: what is trained.
        agent: losses and what it needs of rollouts.
        config: settings.
        run: where metrics and checkpoints go.
        log_z: [conditions] nats, log Z of every condition in the process's order, for the live
            estimate of the gap.
        logger: a TorchRL logger, or None.
        report: called with the figures of every update, for a progress bar.
    """

    def __init__(
        self,
        *,
        env: LatentEnv,
        policy: DenoisingPolicy,
        agent: Agent,
        config: TrainerConfig,
        run: Run,
        log_z: Tensor,
        logger: Any = None,
        report: Callable[[dict[str, float]], None] = lambda figures: None,
    ) -> None:
        self.env, self.policy, self.agent, self.config = env, policy, agent, config
        self.run, self.log_z, self.logger, self.report = run, log_z, logger, report
        self.learner = Learner(policy, agent, config)
        policy.set_checkpointing(agent.plan.checkpointing)
        env.process.set_checkpointing(agent.plan.checkpointing)
        self.update = 0
        self.earlier_s, self.started = 0.0, time.monotonic()

    @property
    def wall_s(self) -> float:
        """Seconds of training, over all resumptions."""
        return self.earlier_s + time.monotonic() - self.started

    def train(self) -> None:
        """Run all updates that are left.

        Raises:
            InvariantError: the untrained policy is not the prior.
            NonFiniteError: a reward, loss or gradient is not finite; the last checkpoint stays.
            Interrupted: the user pressed Ctrl-C; a checkpoint was written.
        """
        if self.update == 0:
            self._check_start()
            self._save()
        with stop_on_interrupt() as stop:
            while self.update < self.config.updates:
                figures = self._one_update()
                self.run.log(figures)
                if self.logger is not None:
                    for name, value in figures.items():
                        self.logger.log_scalar(name, value, step=self.update)
                self.report(figures)
                last = self.update == self.config.updates
                if last or stop.is_set() or self.update % self.config.checkpoint_every == 0:
                    self._save()
                if stop.is_set() and not last:
                    raise Interrupted(
                        f"stopped after update {self.update} of {self.config.updates} and saved; "
                        f"go on with: ctrl-rl train resume={self.run.path}"
                    )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if never interrupted."""
        self.policy.load_state_dict(checkpoint.policy)
        self.env.generator.set_state(checkpoint.training.pop("generator").cpu())
        self.learner.load(checkpoint.training)
        process, counters = self.env.process, checkpoint.counters
        process.prior_calls, process.reward_calls = counters["prior"], counters["reward"]
        self.policy.calls = counters["policy"]
        self.update = checkpoint.update
        self.earlier_s, self.started = counters["wall_s"], time.monotonic()
        self.run.forget_metrics_after(self.update)

    def _one_update(self) -> dict[str, float]:
        episode = rollout(self.env, self.policy, plan=self.agent.plan)
        try:
            self._check_reward(episode)
            losses = self.agent.loss(episode)
            step = self.learner.step(losses, self.update)
        except NonFiniteError as error:
            good = self.run.path / "checkpoints" / f"{self.run.checkpoints()[-1]:06d}"
            raise NonFiniteError(
                f"{error} at update {self.update + 1}; the last good checkpoint is {good}"
            ) from error
        self.update += 1
        process = self.env.process
        return {
            "update": self.update,
            **{name: value.item() for name, value in losses.items()},
            "gap_nats": self._gap(episode),
            **step,
            "denoiser_calls": process.prior_calls + self.policy.calls,
            "reward_calls": process.reward_calls,
        }

    def _gap(self, episode: TensorDict) -> float:
        """Live estimate of the gap on the batch: log Z of its conditions minus its soft returns."""
        index = torch.zeros(episode.batch_size[0], dtype=torch.int64, device=episode.device)
        for name, num_labels in self.env.process.controls.items():
            index = index * num_labels + episode[keys.CONTROL, name][:, 0]
        returns = (episode_reward(episode) - episode_kl(episode)).detach()
        return float((self.log_z.to(returns.device)[index] - returns).mean())

    def _check_start(self) -> None:
        """Contracts and invariants on one rollout of the untrained policy."""
        before = self.env.generator.get_state()
        episode = rollout(self.env, self.policy, plan=self.agent.plan)
        self.env.generator.set_state(before)
        present = [str(key) for key in episode.keys(include_nested=True)]
        for key in self.agent.in_keys:
            if str(key) not in present:
                raise ConfigError(f"the agent reads '{key}'; {did_you_mean(str(key), present)}")
        check_invariants(episode, self.agent.plan)
        process = self.env.process
        process.prior_calls = process.reward_calls = self.policy.calls = 0

    def _check_reward(self, episode: TensorDict) -> None:
        reward = episode_reward(episode)
        bad = (~torch.isfinite(reward)).nonzero()
        if len(bad):
            where = int(bad[0])
            labels = ", ".join(
                f"{name}={int(episode[keys.CONTROL, name][where, 0])}"
                for name in self.env.process.controls
            )
            raise NonFiniteError(f"reward {reward[where].item()} for {labels}")

    def _save(self) -> None:
        process = self.env.process
        counters = {
            "prior": process.prior_calls,
            "policy": self.policy.calls,
            "reward": process.reward_calls,
            "wall_s": self.wall_s,
        }
        training = {"generator": self.env.generator.get_state(), **self.learner.state()}
        checkpoint = Checkpoint(self.update, dict(self.policy.state_dict()), training, counters)
        self.run.save(checkpoint, keep=self.config.keep_checkpoints)
