r"""SubTB: balance of every sub-trajectory of an episode, relative to the prior.

Objective, minimised over the policy and the soft values v together:

    1/2 E[ sum_{i < j} w_ij (v_i(x_i) + sum_{i <= k < j} log_ratio_k - v_j(x_j))^2 ]   [nats^2],

    w_ij = decay^(j - i) / sum_{i' < j'} decay^(j' - i'),      v_K = r(sample, y),

with log_ratio_k = log pi(a_k | s_k) - log p_ref(a_k | s_k) and 0 <= i < j <= K. All paths are zero
together, exactly where those of one step are: v the soft value, pi the soft optimum (see `db`). The
weights trade noise for speed. Short paths have little noise but carry the reward back one step at a
time; long ones see it at once. decay -> 0 is `db` divided by K, decay -> infinity the whole path
alone, which is `pcl` with path_length null.

With the running sum of log-ratios subtracted, level_k = v_k - sum_{j < k} log_ratio_j, the residual
of i and j is level_i - level_j: all K (K + 1) / 2 of them are one table of differences.

The episodes are constants, so they may come from any policy. Where the family of policies does not
contain the soft optimum, the minimum need not be that of J.

References: Madan, Rector-Brooks, Korablyov, Bengio, Jain, Nica, Bosc, Bengio, Malkin, "Learning
GFlowNets from partial episodes for improved convergence and stability", ICML 2023, arXiv
2209.12782 (SubTB(lambda), decay is its lambda).

Deviations: flows are relative to the prior (Venkatraman et al. 2024, arXiv 2405.20971), hence soft
values; v_0 is a function of the given start x_0, not one number; a square with a factor 1/2; no
exploration noise; v starts at the mean return of the first rollout (`OffsetByFirstReturn`).

Metrics: `loss_subtb`; `residual_rms` root of the weighted mean square of all residuals, nats;
`start_value` mean of v_0(x_0) over the batch, nats.
"""

import math
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import nn

from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.critics import OffsetByFirstReturn, state_values
from ctrl_rl.agents.parts.returns import path_levels
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.errors import ConfigError


class SubtrajectoryBalance(Agent):
    """Relative sub-trajectory balance.

    Args:
        task: for the network of soft values.
        critic: makes v from the task, see `ctrl_rl.agents.parts.critics.ValueNetwork`.
        decay: weight of a path relative to one a step shorter, > 0.
        replay: how many past episodes are drawn from; 0 learns from the policy's own only.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.

    Raises:
        ConfigError: decay is not a finite number above 0.
    """

    def __init__(
        self,
        *,
        task: TaskSpec,
        critic: Callable[[TaskSpec], nn.Module],
        decay: float = 0.9,
        replay: int = 0,
        epochs: int = 1,
        minibatches: int = 1,
    ) -> None:
        super().__init__()
        if not 0 < decay < math.inf:
            raise ConfigError(f"agent.decay={decay} must be > 0; 1 weighs all paths alike")
        self.plan = RolloutPlan(
            gradients="score", replay=replay, epochs=epochs, minibatches=minibatches
        )
        self.decay = decay
        self.critic = OffsetByFirstReturn(critic(task))

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Let the values start at the first return."""
        self.critic.start_from(rollout)
        return rollout

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Half the weighted mean of the squared residuals of all paths."""
        values = state_values(self.critic, rollout)
        levels = path_levels(rollout, values)
        squared = (levels[:, :, None] - levels[:, None, :]).square()  # [B, K + 1, K + 1]
        states = torch.arange(levels.shape[1], device=levels.device)
        length = states - states[:, None]
        # In logarithms, since decay^K may leave the range of float32.
        logits = (length * math.log(self.decay)).masked_fill(length < 1, -math.inf)
        weighted = (logits.flatten().softmax(0) * squared.flatten(1)).sum(1).mean()
        return TensorDict(
            {
                "loss_subtb": weighted / 2,
                "residual_rms": weighted.detach().sqrt(),
                "start_value": values.detach()[:, 0].mean(),
            },
            batch_size=[],
        )
