r"""ReFL: the reward of a one-step estimate of the clean sample, at a random late step.

Objective, maximised over the policy's parameters, with k uniform on the last M steps
(M = `one_step_of`):

    E_k E_{x_k ~ pi} E_{a ~ pi(. | x_k)}[ r( x_hat(a, k + 1), y ) - KL_k(x_k) ]
        - sum_{j < K - M} E_{x_j ~ pi}[ KL_j(x_j) ]      [nats]

    KL_k = | loc_k - prior_loc_k |^2 / (2 scale_k^2),

where x_hat(a, k + 1) is the prior's one-call estimate of the clean sample from the latent a,
decoded; for k = K - 1 it is the read-out. x_k is a constant to the gradient, which passes through
one call of the policy and one of the prior, for any K. x_hat is the prior's posterior mean, so
r(x_hat) stands for the soft value v_{k+1}(a) = log E[e^r | a], and is low by what r's curvature and
the spread of clean samples add. For a linear reward of a Gaussian prior it is exact up to a
constant, and the last M steps are steered as in the soft optimum. The sum over earlier steps is
estimated at one of them and keeps a network shared by all steps from drifting there.

Reference: Xu, Liu, Wu, Tong, Li, Ding, Tang, Dong, "ImageReward: Learning and Evaluating Human
Preferences for Text-to-Image Generation", NeurIPS 2023, arXiv 2304.05977 (ReFL).

Deviations from the paper:
- The prior makes the estimate after the policy's step, not the policy before it. The policy's own
  estimate at step k says what the sample would be if all later steps agreed; the prior's later
  steps undo most of such a change. A unit of KL then seems to buy more reward than it does: on the
  gaussian task with 8 steps the best drift would be 1.6 times the soft optimum's in the last step,
  3.5 and 7.9 times in the two before it, and beyond 2 it is worse than no drift.
- The KL of the step replaces the pretraining loss, and the reward is not passed through a bounding
  map: both keep the policy near the prior, but only the KL does so in nats.

Metrics: `loss_refl` the negative objective; `one_step_return` its first line, a batch mean in nats.
It does not estimate the soft return; the trainer logs `reward` and `kl` of the whole episodes.
"""

from tensordict import TensorDict

from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.branches import anchor, branch_late, mean_anchor_kl, mean_branch_return
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.errors import ConfigError


class ReFL(Agent):
    """Pathwise gradient of a one-step estimate of the reward.

    Args:
        one_step_of: M, how many of the last steps the random step is drawn from, 1 or more.

    Raises:
        ConfigError: one_step_of below 1.
    """

    needs_reward_gradient = True
    plan = RolloutPlan(gradients=None)  # only the branch has a graph

    def __init__(self, *, one_step_of: int = 5) -> None:
        super().__init__()
        if one_step_of < 1:
            raise ConfigError(f"agent.one_step_of={one_step_of} must be 1 or more")
        self.one_step_of = one_step_of

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Repeat one of the last steps with a graph, and add the KL of an earlier one."""
        rollout = branch_late(chain, rollout, self.one_step_of)
        return anchor(chain, rollout, self.one_step_of)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative one-step return, averaged over episodes, plus the KL of earlier steps."""
        one_step_return = mean_branch_return(rollout)
        return TensorDict(
            {
                "loss_refl": mean_anchor_kl(rollout) - one_step_return,
                "one_step_return": one_step_return.detach(),
            },
            batch_size=[],
        )
