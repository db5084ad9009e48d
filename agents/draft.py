r"""DRaFT-K: pathwise gradients through the last denoising steps only.

Objective, maximised over the policy's parameters (L = `truncation`; the paper calls it K):

    E_pi[ r(sample, y) - sum_k KL_k ],   KL_k = | loc_k - prior_loc_k |^2 / (2 scale_k^2)   [nats]

with a truncated gradient. The first K - L steps are sampled without a graph; the reward and the KL
of the last L steps reach the parameters through these steps only. Memory and time of the backward
pass are those of L steps, for any K. Of the first K - L steps one, drawn uniformly, adds (K - L)
grad KL_j(x_j) at a constant x_j. This converges to E[ v_{K-L}(x_{K-L}) ] under the prior, with v
the soft value: the last L steps are steered as in the soft optimum and the others not at all.

Reference: Clark, Vicol, Swersky, Fleet, "Directly Fine-Tuning Diffusion Models on Differentiable
Rewards", ICLR 2024, arXiv 2309.17400.

Deviations from the paper:
- The KL of the kept steps is part of the objective. DRaFT maximises the reward alone; an unbounded
  reward, such as a linear one, then has no optimum, and there is no log Z to measure by.
- The KL of the early steps acts too. Nothing in the paper acts there, and the drift that a shared
  network carries into them is welcome; here nobody would pay its price.
- The whole policy is trained, not low-rank adapters of it.

Metrics: `loss_draft` has the gradient above; its value means little, as it counts the KL of the
early steps twice. `soft_return` the batch mean of the reward minus the KL of all steps, nats.
"""

from tensordict import TensorDict

from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.branches import anchor, mean_anchor_kl
from ctrl_rl.agents.parts.returns import mean_soft_return
from ctrl_rl.agents.plan import RolloutPlan


class Draft(Agent):
    """Pathwise gradient of the soft return, cut off before the last steps.

    Args:
        truncation: how many of the last steps are differentiated, 1 or more.
        checkpointing: recompute activations in the backward pass, for large networks.
    """

    def __init__(self, *, truncation: int = 1, checkpointing: bool = False) -> None:
        super().__init__()
        self.plan = RolloutPlan(
            gradients="pathwise", truncation=truncation, checkpointing=checkpointing
        )
        self.truncation = truncation

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add the KL of one of the steps without a graph."""
        return anchor(chain, rollout, self.truncation)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative soft return, and the anchor for the gradient of early KLs."""
        soft_return = mean_soft_return(rollout)
        return TensorDict(
            {
                "loss_draft": mean_anchor_kl(rollout) - soft_return,
                "soft_return": soft_return.detach(),
            },
            batch_size=[],
        )
