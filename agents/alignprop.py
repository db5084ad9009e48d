r"""AlignProp: pathwise gradients through a random number of the last denoising steps.

Objective, maximised over the policy's parameters:

    J(pi) = E_pi[ r(sample, y) - sum_k KL_k ],   KL_k = KL(pi(. | s_k) || p_ref(. | s_k))   [nats]

Only the last L steps of a rollout are differentiated, with L drawn uniformly from 1 .. K; the first
K - L are sampled without a graph. Step k's drift therefore gets the gradient of the whole chain
times how often k is kept, (k + 1) / K: late steps learn fast, early ones slowly. Where every step
has its own parameters the optimum is that of J. Gradients between steps are cut together with the
steps, so a network shared by all steps gets a biased gradient of J.

Reference: Prabhudesai, Goyal, Pathak, Fragkiadaki, "Aligning Text-to-Image Diffusion Models with
Reward Backpropagation", 2023, arXiv 2310.03739.

Deviations from the paper:
- The KL of the kept steps is part of the objective. The paper maximises the reward and stops early.
- The whole policy is trained, not low-rank adapters of it.

Metrics: `loss_alignprop` = -`soft_return`; `soft_return` the batch's estimate of J, nats. The KL of
the steps without a graph is in the value but not in the gradient.
"""

from tensordict import TensorDict

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.returns import mean_soft_return
from ctrl_rl.agents.plan import RolloutPlan


class AlignProp(Agent):
    """Pathwise gradient of the soft return, cut off at a random step.

    Args:
        checkpointing: recompute activations in the backward pass, for large networks.
    """

    def __init__(self, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.plan = RolloutPlan(
            gradients="pathwise", truncation="uniform", checkpointing=checkpointing
        )

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative soft return, averaged over episodes."""
        soft_return = mean_soft_return(rollout)
        return TensorDict(
            {"loss_alignprop": -soft_return, "soft_return": soft_return.detach()}, batch_size=[]
        )
