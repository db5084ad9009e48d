"""The training loop; it knows the contracts, but no folder, logger or screen."""

import time
from collections.abc import Iterator
from functools import partial

from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.parts.returns import episode_kl, episode_reward
from ctrl_rl.agents.plan import in_force
from ctrl_rl.conditions import joint_place, label_counts
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.errors import RunError, one_line
from ctrl_rl.learning.checkpoint import Checkpoint
from ctrl_rl.learning.checks import check_reward
from ctrl_rl.learning.learner import Learner
from ctrl_rl.learning.replay import Replay
from ctrl_rl.learning.update import update
from ctrl_rl.networks.fitting import without_prefix


class Trainer:
    """Trains a policy in an env with an agent's losses: iterating over it makes the updates.

    Args:
        env: where episodes happen; its generator is the only source of randomness.
        learner: policy, agent and optimizer.
        log_z: [conditions] nats, log Z of every condition in the process's order, for the live
            estimate of the gap; None for no estimate.

    Attributes:
        update: number of finished updates.
    """

    def __init__(self, env: LatentEnv, learner: Learner, log_z: Tensor | None) -> None:
        self.env, self.learner, self.log_z = env, learner, log_z
        self.policy, self.agent, self.config = learner.policy, learner.agent, learner.config
        self.replays = {
            start: Replay(phase.plan, env.generator) for start, phase in self.agent.phases.items()
        }
        self.update = 0
        self.earlier_s, self.started = 0.0, time.monotonic()

    @property
    def wall_s(self) -> float:
        """Seconds of training, over all resumptions."""
        return self.earlier_s + time.monotonic() - self.started

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Make the remaining updates, and give the figures of each.

        Raises:
            NonFiniteError: a reward, loss or gradient is not finite.
        """
        while self.update < self.config.updates:
            yield self._one_update()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint as if never interrupted.

        Raises:
            RunError: the checkpoint is of another policy or agent.
        """
        try:
            self.learner.load(checkpoint.policy, checkpoint.training, checkpoint.update)
            self.env.generator.set_state(checkpoint.training["generator"].cpu())
            for start, replay in self.replays.items():
                replay.load(without_prefix(checkpoint.training, f"replay.{start}."))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = one_line(error, 200)
            raise RunError(f"it holds weights of another policy or agent ({reason})") from error
        process, counters = self.env.process, checkpoint.counters
        process.prior_calls, process.reward_calls = counters["prior"], counters["reward"]
        self.policy.calls = counters["policy"]
        self.update = checkpoint.update
        self.earlier_s, self.started = counters["wall_s"], time.monotonic()

    def _one_update(self) -> dict[str, float]:
        progress = self.update / self.config.updates
        episode, learned = update(
            self.env,
            self.learner,
            in_force(self.agent.phases, progress),
            in_force(self.replays, progress),
            step=partial(self.learner.step, self.update),
            check=partial(check_reward, self.env),
        )
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
        place = joint_place(label_counts(self.env.process.controls), asked)
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
