r"""REINFORCE: the policy gradient of the soft return, with a baseline per condition.

Objective, maximised over the policy's parameters:

    J(pi) = E_pi[ r(sample, y) - sum_k KL_k ],   KL_k = KL(pi(. | s_k) || p_ref(. | s_k))   [nats]

Its gradient, with the soft return to go G_k = r - sum_{j >= k} KL_j,

    grad J = E_pi[ sum_k (G_{k+1} - b_k) grad log pi(a_k | s_k) - grad KL_k(s_k) ],

where b_k is any number that does not depend on a_k. The direct term grad KL_k uses the closed form,
so the KL of a step adds no noise. b_k is the mean of G_{k+1} over the other episodes of the batch
with the same condition (leave one out, for an unbiased estimate). Where a control is a number, a
regression on it takes the place of the mean, see `advantages.baseline`.

References: Williams 1992, "Simple statistical gradient-following algorithms"; Black, Janner, Du,
Kostrikov, Levine, "Training Diffusion Models with Reinforcement Learning", ICLR 2024,
arXiv 2305.13301 (DDPO-SF); leave-one-out baseline: Kool, van Hoof, Welling 2019.

Deviations from DDPO-SF:
- The KL to the prior is part of the objective. DDPO maximises the reward alone.
- Every step is credited with what follows it only, instead of the whole episode's reward.
- Log-probabilities are sums over dimensions, not means.
- The baseline is per condition and leaves one out. Advantages are not divided by their standard
  deviation, which would weight conditions by how hard they are.

Metrics: `loss_reinforce` the surrogate whose gradient is -grad J (its value means nothing);
`advantage_std` standard deviation of G_{k+1} - b_k, nats.
"""

from tensordict import TensorDict

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.advantages import step_advantage
from ctrl_rl.agents.plan import RolloutPlan


class Reinforce(Agent):
    """Score-function gradient of the soft return."""

    plan = RolloutPlan(gradients="score")

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Surrogate of the soft return's gradient."""
        advantage = step_advantage(rollout)
        score = (advantage * rollout[keys.ACTION_LOG_PROB]).sum(1).mean()
        return TensorDict(
            {
                "loss_reinforce": rollout[keys.KL].sum(1).mean() - score,
                "advantage_std": advantage.std(),
            },
            batch_size=[],
        )
