"""The training loop: rollout, losses, optimizer steps; it knows only the contracts."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.conditions import joint_place
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import NonFiniteError, RunError
from ctrl_rl.interrupts import Interrupted, stop_on_interrupt
from ctrl_rl.learning.checks import check_reward
from ctrl_rl.learning.learner import Learner, without_prefix
from ctrl_rl.learning.replay import Replay
from ctrl_rl.learning.update import update
from ctrl_rl.plans import in_force
from ctrl_rl.runs import Checkpoint, Run
from ctrl_rl.soft_returns import episode_kl, episode_reward


class Trainer:
    """Trains a policy in an env with an agent's losses, into a run folder.

    Args:
        env: where episodes happen; its generator is the only source of randomness.
        learner: policy, agent and optimizer.
        run: where metrics and checkpoints go.
        log_z: [conditions] nats, log Z of every condition in the process's order, for the live
            estimate of the gap; None for no such estimate.
        logger: a TorchRL logger, or None.
        report: called with the figures of every update, for a progress bar.
    """

    def __init__(
        self,
        *,
        env: LatentEnv,
        learner: Learner,
        run: Run,
        log_z: Tensor | None,
        logger: Any = None,
        report: Callable[[dict[str, float]], None] = lambda figures: None,
    ) -> None:
        self.env, self.learner, self.run, self.log_z = env, learner, run, log_z
        self.policy, self.agent, self.config = learner.policy, learner.agent, learner.config
        self.replays = {
            start: Replay(phase.plan, env.generator) for start, phase in self.agent.phases.items()
        }
        self.logger, self.report = logger, report
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
            for start, replay in self.replays.items():
                replay.load(without_prefix(checkpoint.training, f"replay.{start}."))
        except (RuntimeError, KeyError, ValueError) as error:
            raise RunError(f"{self.run.path} holds weights of another policy or agent") from error
        process, counters = self.env.process, checkpoint.counters
        process.prior_calls, process.reward_calls = counters["prior"], counters["reward"]
        self.policy.calls = counters["policy"]
        self.update = checkpoint.update
        self.earlier_s, self.started = counters["wall_s"], time.monotonic()
        self.run.forget_after(self.update)

    def _one_update(self) -> dict[str, float]:
        progress = self.update / self.config.updates
        try:
            episode, learned = update(
                self.env,
                self.learner,
                in_force(self.agent.phases, progress),
                in_force(self.replays, progress),
                step=partial(self.learner.step, self.update),
                check=partial(check_reward, self.env),
            )
        except NonFiniteError as error:
            good = self.run.path / "checkpoints" / f"{self.run.checkpoints()[-1]:06d}"
            raise NonFiniteError(
                f"update {self.update + 1}: {error}; the last good checkpoint is {good}"
            ) from error
        self.update += 1
        process = self.env.process
        return {
            "update": self.update,
            "reward": episode_reward(episode).mean().item(),
            "kl": episode_kl(episode).mean().item(),
            **self._gap(episode),
            **learned,
            "denoiser_calls": process.prior_calls + self.policy.calls,
            "reward_calls": process.reward_calls,
        }

    def _gap(self, episode: TensorDict) -> dict[str, float]:
        """Live estimate of the gap on the batch: log Z of its conditions minus its soft returns."""
        if self.log_z is None:
            return {}
        asked = dict(episode[keys.CONTROL][:, 0].items())
        place = joint_place(self.env.process.controls, asked)
        returns = (episode_reward(episode) - episode_kl(episode)).detach()
        return {"gap_nats": float((self.log_z.to(returns.device)[place] - returns).mean())}

    def checkpoint(self) -> Checkpoint:
        """The state after the last finished update."""
        process = self.env.process
        counters = {
            "prior": process.prior_calls,
            "policy": self.policy.calls,
            "reward": process.reward_calls,
            "wall_s": self.wall_s,
        }
        past = {
            f"replay.{start}.{name}": value
            for start, replay in self.replays.items()
            for name, value in replay.state().items()
        }
        training = {"generator": self.env.generator.get_state(), **self.learner.state(), **past}
        return Checkpoint(self.update, dict(self.policy.state_dict()), training, counters)

    def _save(self) -> None:
        self.run.save(self.checkpoint(), keep=self.config.keep_checkpoints)
