r"""DB: detailed balance relative to the prior, a squared equation per step with learned flows.

Objective, minimised over the policy and the soft values v together:

    1/2 E[ sum_k (v_k(x_k) + log_ratio_k - v_{k+1}(x_{k+1}))^2 ]   [nats^2],    v_K = r(sample, y),

    log_ratio_k = log pi(a_k | s_k) - log p_ref(a_k | s_k).

Detailed balance asks F(s) pi(s' | s) = F(s') p_back(s | s') of a flow F through states. With the
prior's own time reversal as p_back and log F_k(x) = log p_ref(x_k = x) + v_k(x), the prior's
marginals cancel, and only v is left to learn. Zero at every step and state means
v_k = log E_ref[e^r | x_k], the soft value, and pi = p_ref e^{v_{k+1} - v_k}, the soft optimum. As
v_0 is a function of x_0, the given start costs nothing, unlike in `tb`.

The episodes are constants, so they may come from any policy. The gradient goes to both values of
every equation and to the policy. Where the family of policies does not contain the soft optimum,
the minimum of the squares depends on whose episodes are used and need not be that of J.

References: Bengio, Lahlou, Deleu, Hu, Tiwari, Bengio, "GFlowNet Foundations", JMLR 2023, arXiv
2111.09266; relative to a prior: Venkatraman et al., NeurIPS 2024, arXiv 2405.20971 (there for whole
trajectories, see `tb`). Equality with path consistency over one step (`pcl`): Deleu, Nouri, Malkin,
Precup, Bengio, "Discrete Probabilistic Inference as Control in Multi-path Environments", UAI 2024,
arXiv 2402.10309.

Deviations: flows relative to the prior's marginals; a square with a factor 1/2; no exploration
noise; v starts at the mean return of the first rollout (`OffsetByFirstReturn`).

Metrics: `loss_db`; `residual_rms` root of the mean square of all residuals, nats; `start_value`
mean of v_0(x_0) over the batch, nats.
"""

from collections.abc import Callable

from tensordict import TensorDict
from torch import nn

from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.critics import OffsetByFirstReturn, state_values
from ctrl_rl.agents.parts.returns import path_levels
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec


class DetailedBalance(Agent):
    """Relative detailed balance.

    Args:
        task: for the network of soft values.
        critic: makes v from the task, see `ctrl_rl.agents.parts.critics.ValueNetwork`.
        replay: how many past episodes are drawn from; 0 learns from the policy's own only.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.
    """

    def __init__(
        self,
        *,
        task: TaskSpec,
        critic: Callable[[TaskSpec], nn.Module],
        replay: int = 0,
        epochs: int = 1,
        minibatches: int = 1,
    ) -> None:
        super().__init__()
        self.plan = RolloutPlan(
            gradients="score", replay=replay, epochs=epochs, minibatches=minibatches
        )
        self.critic = OffsetByFirstReturn(critic(task))

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Let the values start at the first return."""
        self.critic.start_from(rollout)
        return rollout

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Half the squared residuals, summed over steps and averaged over episodes."""
        values = state_values(self.critic, rollout)
        levels = path_levels(rollout, values)
        squared = (levels[:, :-1] - levels[:, 1:]).square()
        return TensorDict(
            {
                "loss_db": squared.sum(1).mean() / 2,
                "residual_rms": squared.detach().mean().sqrt(),
                "start_value": values.detach()[:, 0].mean(),
            },
            batch_size=[],
        )
