r"""PCL: path consistency learning, soft Bellman equations over d steps, on and off the policy.

Objective, minimised over the policy and the soft values v together:

    1/2 E[ sum_{i = 0}^{K - d} C_i^2 ]   [nats^2],

    C_i = -v_i(x_i) + v_{i+d}(x_{i+d}) - sum_{i <= k < i + d} log_ratio_k,      v_K = r(sample, y),

with log_ratio_k = log pi(a_k | s_k) - log p_ref(a_k | s_k), all rewards but the last being 0 and
nothing discounted. At the soft optimum C_i = 0 on every path of every episode, for any acting
policy: old episodes need no importance weights. The gradient goes to the policy and to both values,
with a learning rate for each of the two networks.

d = 1 is the loss of `db`. d = K (path_length null) is one equation per episode: the loss of `tb`
with the soft value v_0(x_0) of the start in place of log Z_y, which makes it exact for a given
start. On the policy's own episodes its expected gradient for the policy is -grad J.

Where the family of policies does not contain the soft optimum, the minimum depends on whose
episodes are used, and is that of J only for d = K on the policy's own.

Reference: Nachum, Norouzi, Xu, Schuurmans, "Bridging the Gap Between Value and Policy Based
Reinforcement Learning", NeurIPS 2017, arXiv 1702.08892.

Deviations:
- The KL to the prior plays the part of the entropy, with temperature 1 nat: without reward the
  policy is the prior's mean, and v is relative to the prior.
- Batches are drawn evenly from the last `replay` episodes, including the newest, instead of one
  step on new and one on old episodes chosen by their reward.
- v starts at the mean return of the first rollout, not at 0, see `OffsetByFirstReturn`.

Metrics: `loss_pcl`; `residual_rms` root of the mean square of C, nats; `start_value` mean of
v_0(x_0) over the batch, nats.
"""

from collections.abc import Callable

from tensordict import TensorDict
from torch import nn

from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.critics import OffsetByFirstReturn, state_values
from ctrl_rl.agents.parts.returns import path_levels
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.errors import ConfigError


class PathConsistency(Agent):
    """Path consistency learning.

    Args:
        task: for K and the network of soft values.
        critic: makes v from the task, see `ctrl_rl.agents.parts.critics.ValueNetwork`.
        path_length: steps d of a path, 1 to K; null for the whole episode.
        replay: how many past episodes are drawn from; 0 learns from the policy's own only.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.

    Raises:
        ConfigError: path_length is not within an episode.
    """

    def __init__(
        self,
        *,
        task: TaskSpec,
        critic: Callable[[TaskSpec], nn.Module],
        path_length: int | None = None,
        replay: int = 0,
        epochs: int = 1,
        minibatches: int = 1,
    ) -> None:
        super().__init__()
        self.path_length = task.num_steps if path_length is None else path_length
        if not 1 <= self.path_length <= task.num_steps:
            raise ConfigError(
                f"agent.path_length={path_length} must be 1 to {task.num_steps}, the number of "
                "steps; use null for the whole episode"
            )
        self.plan = RolloutPlan(
            gradients="score", replay=replay, epochs=epochs, minibatches=minibatches
        )
        self.critic = OffsetByFirstReturn(critic(task))

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Let the values start at the first return."""
        self.critic.start_from(rollout)
        return rollout

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Half the squared inconsistencies, summed over paths and averaged over episodes."""
        values = state_values(self.critic, rollout)
        levels = path_levels(rollout, values)
        squared = (levels[:, self.path_length :] - levels[:, : -self.path_length]).square()
        return TensorDict(
            {
                "loss_pcl": squared.sum(1).mean() / 2,
                "residual_rms": squared.detach().mean().sqrt(),
                "start_value": values.detach()[:, 0].mean(),
            },
            batch_size=[],
        )
