r"""DRaFT-LV: the last denoising step, differentiated from several noisy copies of one sample.

Objective, maximised over the policy's parameters, with k = K - 1:

    E[ r(sample', y) - KL_k(x) ] - sum_{j < k} KL_j,
    x ~ N( signal_k clean, noise_k^2 I ),

    KL_k = | loc_k - prior_loc_k |^2 / (2 scale_k^2)      [nats]

where `clean` is the end of an episode of the present policy, and the last step and the read-out
turn x into sample'. x is drawn n times per episode (n = `renoise`) and the n gradients are
averaged: a gradient of lower variance for n policy calls instead of n episodes. Its optimum is that
of `draft` with truncation 1, except for the law of x: the forward process from policy samples, not
the policy's own; the two agree for the prior. The sum over earlier steps is estimated at one of
them and keeps a network shared by all steps from drifting there.

Reference: Clark, Vicol, Swersky, Fleet, "Directly Fine-Tuning Diffusion Models on Differentiable
Rewards", ICLR 2024, arXiv 2309.17400.

Deviations from the paper:
- The KL is part of the objective, including that of earlier steps, for the reasons in `draft`.
- The last stochastic step is differentiated. After it comes the prior's read-out, which has no
  parameters; in the paper the last step is the network's.

Metrics: `loss_draft_lv` the negative objective; `one_step_return` the reward of the copies minus
the KL of their step, averaged, nats. It does not estimate the soft return; the trainer logs
`reward` and `kl` of the whole episodes.
"""

from tensordict import TensorDict

from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.branches import (
    anchor,
    branch_renoised,
    mean_anchor_kl,
    mean_branch_return,
)
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.errors import ConfigError


class DraftLV(Agent):
    """Pathwise gradient through the last step from re-noised samples.

    Args:
        renoise: n, noisy copies of every clean sample, 1 or more.

    Raises:
        ConfigError: renoise below 1.
    """

    needs_reward_gradient = True
    plan = RolloutPlan(gradients=None)  # only the branch has a graph

    def __init__(self, *, renoise: int = 2) -> None:
        super().__init__()
        if renoise < 1:
            raise ConfigError(f"agent.renoise={renoise} must be 1 or more")
        self.renoise = renoise

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Take the last step from noisy copies with a graph, and the KL of an earlier one."""
        return anchor(chain, branch_renoised(chain, rollout, self.renoise), last=1)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative one-step return of the copies, averaged, plus the KL of earlier steps."""
        one_step_return = mean_branch_return(rollout)
        return TensorDict(
            {
                "loss_draft_lv": mean_anchor_kl(rollout) - one_step_return,
                "one_step_return": one_step_return.detach(),
            },
            batch_size=[],
        )
