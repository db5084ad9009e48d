r"""VarGrad: the variance of the log-weights of a condition's episodes, with no log Z to learn.

Objective, minimised over the policy:

    1/2 E_y[ Var( f | y ) ]   [nats^2],      f = r(sample, y) - sum_k log_ratio_k,

with log_ratio_k = log pi(a_k | s_k) - log p_ref(a_k | s_k). The episodes are constants: nothing is
differentiated through the sampling. f is the log-weight of an episode; if the policy were exact and
every start alike, it would be log Z_y in every episode. The variance is estimated from the n_y
episodes of the batch with condition y, without bias (divided by n_y - 1), and conditions are
weighted by their share of the batch:

    loss = 1/2 mean_i n_y / (n_y - 1) (f_i - mean_y f)^2.

Its gradient is n_y / (n_y - 1) times that of `tb` with the batch's mean of f as log Z_y, and equal
to that of `tb` with the mean over the other episodes of the condition. It is therefore an unbiased
estimate of -grad J for the soft return J, with a one-sample KL and a leave-one-out baseline.

A condition with one episode in the batch has no variance: that episode contributes nothing.

The start x_0 is given, not chosen. At the soft optimum f = v_0(x_0), whose variance over starts
stays in the loss; on the policy's own episodes, the only ones used here, it is noise of mean 0.

References: Richter, Boustati, Nuesken, Ruiz, Akyildiz, "VarGrad", NeurIPS 2020, arXiv 2010.10436;
the log-variance divergence on path space: Nuesken, Richter, "Solving high-dimensional
Hamilton-Jacobi-Bellman PDEs using neural networks", 2021, arXiv 2005.05409.

Deviations: one variance per condition; the half and the weights make the gradient that of J, in the
unit in which `tb` has it. The log-variance divergence may be taken over episodes of any policy, but
over others than the present one v_0(x_0) would bias it (see `tb`); this is not offered.

Metrics: `loss_vargrad`; `alone` share of the batch's episodes that contribute nothing because no
other has their condition.
"""

import torch
from tensordict import TensorDict

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.advantages import condition_index, group_mean
from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.agents.plan import RolloutPlan


class VarGrad(Agent):
    """Log-variance per condition."""

    plan = RolloutPlan(gradients="score")
    needs_equal_conditions = True

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Half the variance of the log-weights, averaged over conditions."""
        log_weight = episode_reward(rollout) - episode_log_ratio(rollout)
        index = condition_index(rollout)
        count = torch.bincount(index)[index]
        squared = (log_weight - group_mean(log_weight, index)).square()
        return TensorDict(
            {
                "loss_vargrad": (squared * count / (count - 1).clamp(min=1)).mean() / 2,
                "alone": (count == 1).float().mean(),
            },
            batch_size=[],
        )
