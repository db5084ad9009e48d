r"""CTRL: conditional control by pathwise gradients through the whole denoising chain.

Objective, maximised over the policy's parameters:

    J(pi) = E_pi[ gamma log p(y | sample) - sum_k KL( pi(. | s_k) || p_ref(. | s_k) ) ]   [nats]

    KL_k = | loc_k - prior_loc_k |^2 / (2 scale_k^2),   summed over dimensions.

Each action is loc_k + scale_k * noise. For fixed noise both terms are then differentiable functions
of the parameters; their gradient is taken through all K steps, the read-out and the reward. The
prior's mean is also a function of the latent, so the KL's gradient flows through the frozen prior
too. The optimum samples p(sample) p(y | sample)^gamma.

Reference: Zhao, Uehara, Scalia, Kung, Biancalani, Levine, Hajiramezanali, "Adding Conditional
Control to Diffusion Models with Reinforcement Learning", ICLR 2025, arXiv 2406.12120, algorithm 2.

Deviations from the authors' published code, each towards the paper's objective:
- The KL is a sum over dimensions. A mean would scale gamma by the number of dimensions.
- Truncation is true truncation: the first K - L steps are sampled without a graph, so neither the
  reward nor their own KL reaches the parameters through them. (Dropping the gradient of single
  steps at random inside a kept chain is another estimator.) It saves memory and time and is biased;
  the whole chain is the default.

Metrics: `loss_ctrl` = -`soft_return`; `soft_return` the batch's estimate of J, in nats.
"""

from typing import Literal

from tensordict import TensorDict

from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.returns import mean_soft_return
from ctrl_rl.agents.plan import RolloutPlan


class Ctrl(Agent):
    """Pathwise gradient of the soft return.

    Args:
        checkpointing: recompute activations in the backward pass, for large networks.
        truncation: gradient through the last steps only: null for all, a number, or `uniform`.
    """

    def __init__(
        self,
        *,
        checkpointing: bool = False,
        truncation: int | Literal["uniform"] | None = None,
    ) -> None:
        super().__init__()
        self.plan = RolloutPlan(
            gradients="pathwise",
            checkpointing=checkpointing,
            truncation=truncation,
        )

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative soft return, averaged over episodes."""
        soft_return = mean_soft_return(rollout)
        return TensorDict(
            {
                "loss_ctrl": -soft_return,
                "soft_return": soft_return.detach(),
            },
            batch_size=[],
        )
