r"""VarGrad: the variance of the log-weights of one control's episodes, with no log Z to learn.

Objective, to be minimised over the policy:

    1/2 E_y[ Var( f | y ) ]   [nats^2],      f = r(sample, y) - sum_k log_ratio_k,

with log_ratio_k = log pi(a_k | s_k) - log p_ref(a_k | s_k). The episodes are constants: nothing is
differentiated through the sampling. f is the log-weight of an episode; if the policy were exact and
every start alike, it would be log Z_y in every episode. The variance is estimated from the n_y
episodes of the batch with control y, without bias (divided by n_y - 1), and controls are weighted
by their share of the batch:

    loss = 1/2 mean_i n_y / (n_y - 1) (f_i - mean_y f)^2.

Its gradient is n_y / (n_y - 1) times that of `tb` with the batch's mean of f for log Z_y, and equal
to that of `tb` with the mean over the other episodes of the control. It is therefore an unbiased
estimate of -grad J for the soft return J, with a one-sample KL and a leave-one-out baseline.

A control with one episode in the batch has no variance: that episode contributes nothing.

The start x_0 is given and not chosen. At the soft optimum f = v_0(x_0), whose variance over starts
stays in the loss; on the policy's own episodes, the only ones used here, it is noise of mean 0.

References: Richter, Boustati, Nuesken, Ruiz, Akyildiz, "VarGrad", NeurIPS 2020, arXiv 2010.10436;
the log-variance divergence on path space: Nuesken, Richter, "Solving high-dimensional
Hamilton-Jacobi-Bellman PDEs using neural networks", 2021, arXiv 2005.05409.

Deviations: conditional on the control, so one variance per control; the half and the weights make
the gradient that of J, in the unit in which `tb` has it. The log-variance divergence may be taken
over episodes of any policy; over others than the present one v_0(x_0) would bias it (see `tb`), so
it is not offered.

Metrics: `loss_vargrad`; `alone` share of the batch's episodes that contribute nothing because no
other has their control.
"""

import torch
from tensordict import TensorDict

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.advantages import condition_index, group_mean
from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.agents.plan import RolloutPlan


class VarGrad(Agent):
    """Log-variance per control."""

    plan = RolloutPlan(gradients="score")
    needs_equal_conditions = True

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Half the variance of the log-weights, averaged over controls."""
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
