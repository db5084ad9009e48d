"""The training loop: rollout, loss, one optimizer step; it knows only the contracts."""

import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import ConfigError, InvariantError, NonFiniteError, RunError, did_you_mean
from ctrl_rl.interrupts import Interrupted, stop_on_interrupt
from ctrl_rl.learner import Learner
from ctrl_rl.rollouts import check_invariants, rollout
from ctrl_rl.runs import Checkpoint, Run
from ctrl_rl.soft_returns import episode_kl, episode_reward


def check_start(env: LatentEnv, learner: Learner) -> None:
    """Contracts and invariants on one rollout of the untrained policy, which leaves no trace.

    Raises:
        ConfigError: prior, policy and reward do not fit each other, or the agent reads a key that
            rollouts do not have.
        InvariantError: the policy is not the prior, or a gradient that the agent needs is missing.
        NonFiniteError: a reward is not finite.
    """
    process, policy, agent = env.process, learner.policy, learner.agent
    before = env.generator.get_state()
    try:
        episode = rollout(env, policy, plan=agent.plan)
    except RuntimeError as error:  # torch's kind for shapes that do not fit
        reason = " ".join(str(error).split())
        raise ConfigError(f"prior, policy and reward do not fit each other: {reason}") from error
    env.generator.set_state(before)
    process.prior_calls = process.reward_calls = policy.calls = 0
    present = [str(key) for key in episode.keys(include_nested=True)]
    for key in agent.in_keys:
        if str(key) not in present:
            raise ConfigError(f"the agent reads '{key}'; {did_you_mean(str(key), present)}")
    check_invariants(episode, agent.plan)
    reward = episode_reward(episode)
    if agent.needs_reward_gradient and not reward.requires_grad:
        name = type(process.reward_model).__name__
        raise InvariantError(f"{name} says that it is differentiable, and its result has no graph")
    check_reward(env, episode)


def check_reward(env: LatentEnv, episode: TensorDict) -> None:
    """Raise `NonFiniteError` with the labels of the first reward that is not finite."""
    reward = episode_reward(episode)
    bad = (~torch.isfinite(reward)).nonzero()
    if len(bad):
        where = int(bad[0])
        labels = ", ".join(
            f"{name}={int(episode[keys.CONTROL, name][where, 0])}" for name in env.process.controls
        )
        raise NonFiniteError(f"the reward is {reward[where].item()} for {labels}")


class Trainer:
    """Trains a policy in an env with an agent's losses, into a run folder.

    Args:
        env: where episodes happen; its generator is the only source of randomness.
        learner: policy, agent and optimizer.
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
        learner: Learner,
        run: Run,
        log_z: Tensor,
        logger: Any = None,
        report: Callable[[dict[str, float]], None] = lambda figures: None,
    ) -> None:
        self.env, self.learner, self.run, self.log_z = env, learner, run, log_z
        self.policy, self.agent, self.config = learner.policy, learner.agent, learner.config
        self.logger, self.report = logger, report
        self.policy.set_checkpointing(self.agent.plan.checkpointing)
        env.process.set_checkpointing(self.agent.plan.checkpointing)
        self.update = 0
        self.earlier_s, self.started = 0.0, time.monotonic()

    @property
    def wall_s(self) -> float:
        """Seconds of training, over all resumptions."""
        return self.earlier_s + time.monotonic() - self.started

    def train(self) -> None:
        """Run all updates that are left.

        Raises:
            NonFiniteError: a reward, loss or gradient is not finite; the last checkpoint stays.
            Interrupted: the user pressed Ctrl-C; a checkpoint was written.
        """
        if self.update == 0:
            self._save()
        with stop_on_interrupt() as stop:
            while self.update < self.config.updates:
                figures = self._one_update()
                self.run.log(figures)
                if self.logger is not None:
                    for name, value in figures.items():
                        self.logger.log_scalar(name, value, step=self.update)
                self.report(figures)
                stopped, last = stop.is_set(), self.update == self.config.updates
                if stopped or last or self.update % self.config.checkpoint_every == 0:
                    self._save()
                if stopped:
                    raise Interrupted(
                        f"stopped after update {self.update} of {self.config.updates} and saved; "
                        f"go on with: ctrl-rl train resume={self.run.path}"
                    )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if never interrupted.

        Raises:
            RunError: the checkpoint is of another policy or agent.
        """
        try:
            self.learner.load(checkpoint.policy, checkpoint.training)
            self.env.generator.set_state(checkpoint.training["generator"].cpu())
        except (RuntimeError, KeyError, ValueError) as error:
            raise RunError(f"{self.run.path} holds weights of another policy or agent") from error
        process, counters = self.env.process, checkpoint.counters
        process.prior_calls, process.reward_calls = counters["prior"], counters["reward"]
        self.policy.calls = counters["policy"]
        self.update = checkpoint.update
        self.earlier_s, self.started = counters["wall_s"], time.monotonic()
        self.run.forget_after(self.update)

    def _one_update(self) -> dict[str, float]:
        episode = rollout(self.env, self.policy, plan=self.agent.plan)
        try:
            check_reward(self.env, episode)
            losses = self.agent.loss(episode)
            step = self.learner.step(losses, self.update)
        except NonFiniteError as error:
            good = self.run.path / "checkpoints" / f"{self.run.checkpoints()[-1]:06d}"
            raise NonFiniteError(
                f"update {self.update + 1}: {error}; the last good checkpoint is {good}"
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

    def checkpoint(self) -> Checkpoint:
        """The state after the last finished update."""
        process = self.env.process
        counters = {
            "prior": process.prior_calls,
            "policy": self.policy.calls,
            "reward": process.reward_calls,
            "wall_s": self.wall_s,
        }
        training = {"generator": self.env.generator.get_state(), **self.learner.state()}
        return Checkpoint(self.update, dict(self.policy.state_dict()), training, counters)

    def _save(self) -> None:
        self.run.save(self.checkpoint(), keep=self.config.keep_checkpoints)
