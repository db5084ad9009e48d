r"""TB: relative trajectory balance, a squared equation per episode with a learned log Z.

Objective, minimised over the policy and log Z_y, a number per condition (a function of y
where a control is a number):

    1/2 E[ (log Z_y + sum_k log_ratio_k - r(sample, y))^2 ]   [nats^2]

    log_ratio_k = log pi(a_k | s_k) - log p_ref(a_k | s_k).

The episodes are constants: nothing is differentiated through the sampling, so they may come from
any policy. On the policy's own episodes the expected gradient is

    E_pi[ (log Z_y + sum_k log_ratio_k - r) sum_k grad log pi(a_k | s_k) ] = -grad J

for every log Z_y, which is only a baseline there: TB is the policy gradient of the soft return J
with a one-sample KL, and its optimum in any family of policies is that of J.

The start x_0 ~ N(0, I) is given, not chosen, and the soft optimum has
sum_k log_ratio_k = r - v_0(x_0). The loss there is half the variance of the soft value v_0(x_0)
over starts, not 0, and the best log Z_y is the mean of v_0(x_0), which is the optimum of J and lies
below log E[e^{v_0(x_0)}]. On the policy's own episodes this is noise of mean 0. On episodes of
other policies (`replay`) it is a bias, since a policy can lower the loss by a log-ratio that tells
starts apart. `pcl` with the whole path has v_0(x_0) in place of log Z_y, and no such bias.

References: Malkin, Jain, Bengio, Sun, Bengio, "Trajectory Balance", NeurIPS 2022, arXiv 2201.13259;
relative to a prior: Venkatraman et al., "Amortizing intractable inference in diffusion models for
vision, language, and control", NeurIPS 2024, arXiv 2405.20971; equality with the policy gradient:
Malkin et al., "GFlowNets and variational inference", ICLR 2023, arXiv 2210.00580.

Deviations: the square has a factor 1/2, to make the gradient that of J. Episodes are the policy's
own or drawn evenly from the last ones; there is no exploration noise, no prioritised replay and no
episode grown backwards from a sample. log Z_y starts at the mean return of the first rollout, not
at 0: a baseline far above all returns would drive the policy off the prior.

Metrics: `loss_tb`; `log_z` mean of the learned log Z_y over the batch, nats.
"""

from tensordict import TensorDict
from torch import nn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.critics import LogPartition, OffsetByFirstReturn
from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec


class TrajectoryBalance(Agent):
    """Relative trajectory balance.

    Args:
        task: the controls, for log Z_y.
        replay: how many past episodes are drawn from; 0 learns from the policy's own only.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.
    """

    def __init__(
        self, *, task: TaskSpec, replay: int = 0, epochs: int = 1, minibatches: int = 1
    ) -> None:
        super().__init__()
        self.plan = RolloutPlan(
            gradients="score", replay=replay, epochs=epochs, minibatches=minibatches
        )
        self.log_z = OffsetByFirstReturn(LogPartition(task))

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Let log Z_y start at the first return."""
        self.log_z.start_from(rollout)
        return rollout

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Half the mean squared residual of the episodes."""
        log_z = self.log_z(dict(rollout[keys.CONTROL][:, 0].items()))
        residual = log_z + episode_log_ratio(rollout) - episode_reward(rollout)
        return TensorDict(
            {
                "loss_tb": residual.square().mean() / 2,
                "log_z": log_z.detach().mean(),
            },
            batch_size=[],
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The numbers log Z_y."""
        return {"log_z": list(self.log_z.parameters())}
