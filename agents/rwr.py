r"""RWR: fit the policy by maximum likelihood to episodes weighted by their reward.

Objective, minimised over the policy's parameters:

    KL(p* || pi) = E_p*[ log p*(path) - sum_k log pi(a_k | s_k) ]   [nats],   p* = p_ref e^r / Z_y,

p* being the soft-optimal law of paths. Episodes come from a policy pi_b, the present one or the
prior, and stand for p* with the weight

    w = e^l / (mean of e^l over the batch's episodes of the condition),
    l = r(sample, y) - sum_k log( pi_b(a_k | s_k) / p_ref(a_k | s_k) ),

which averages 1 for every condition. The loss is

    mean_i sum_k [ KL(pi_b || pi)(s_k) - (w_i - 1) log( pi(a_k | s_k) / pi_b(a_k | s_k) ) ],

whose mean is KL(p* || pi) - KL(p* || pi_b), except for the self-normalisation. It is the weighted
likelihood, -w log pi, plus a control variate, log pi(a) - E_pi_b[log pi], which has mean 0 at every
state for any pi. So an episode of weight 1 draws the policy to pi_b's mean, not to its noise. Where
all weights are equal, as at the soft optimum except for the start (see `tb`), the gradient is 0 in
every batch. On the policy's own episodes it is -E[ (w - 1) grad log pi ], the policy gradient of J
with e^advantage - 1 in place of the advantage.

The optimum at fixed scale has loc_k(x) = E_p*[x_{k+1} | x_k = x]. Where soft values are linear that
is the optimum of J; elsewhere it covers p* in the mean where J prefers its modes.

References: Peters, Schaal, "Reinforcement Learning by Reward-Weighted Regression for Operational
Space Control", ICML 2007; for text-to-image models: Lee et al., "Aligning Text-to-Image Models
using Human Feedback", 2023, arXiv 2302.12192, and the baseline called RWR in Black et al.,
"Training Diffusion Models with Reinforcement Learning", ICLR 2024, arXiv 2305.13301.

Deviations:
- The likelihood is that of whole denoising paths, exact at every step; the papers above put the
  weight on the denoising loss of the sample, which is a bound of its likelihood.
- Weights are e^r, with `env.guidance_strength` as the only temperature, times the importance ratio
  to the prior, without which repeated rounds would multiply e^r into e^{n r} and forget the prior.
- The control variate.

Weights normalised by the batch are biased by O(1/n) for n episodes of a condition; a condition with
one episode has weight 1 and teaches nothing.

Metrics: `loss_rwr` nats, 0 for one optimizer step on the policy's own episodes regardless of its
gradient; `ess` effective sample size as a share, 1 / (mean of w^2 per condition), 1 at best.
"""

from typing import Literal

from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.advantages import condition_index, group_mean
from ctrl_rl.agents.parts.returns import episode_reward
from ctrl_rl.agents.plan import BEHAVIOURS, RolloutPlan
from ctrl_rl.errors import check_choice

_WEIGHT = "weight"


class RewardWeightedRegression(Agent):
    """Weighted maximum likelihood of paths.

    Args:
        rollouts: `policy` for the policy's own episodes, `prior` for the pretrained model's.
        replay: how many past episodes are drawn from; they keep their weights.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.
        step_chunks: pieces along time that are differentiated one by one, to save memory.

    Raises:
        ConfigError: a value out of range.
    """

    needs_equal_conditions = True

    def __init__(
        self,
        *,
        rollouts: Literal["policy", "prior"] = "policy",
        replay: int = 0,
        epochs: int = 1,
        minibatches: int = 1,
        step_chunks: int = 1,
    ) -> None:
        super().__init__()
        check_choice("agent.rollouts", rollouts, BEHAVIOURS)
        self.plan = RolloutPlan(
            gradients="score",
            behaviour=rollouts,
            replay=replay,
            epochs=epochs,
            minibatches=minibatches,
            step_chunks=step_chunks,
        )

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add the weights of episodes, [B, K], the same at all steps."""
        action, scale = rollout[keys.ACTION], rollout[keys.SCALE]
        behaviour = rollout[keys.BEHAVIOUR_LOC]
        spent = gaussian.log_ratio(action, behaviour, rollout[keys.PRIOR_LOC], scale).sum(1)
        weight = _normalised(episode_reward(rollout) - spent, condition_index(rollout))
        return rollout.copy().set(_WEIGHT, weight[:, None].expand(rollout.shape))

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Weighted negative log-likelihood with its control variate."""
        action, scale = rollout[keys.ACTION], rollout[keys.SCALE]
        loc, behaviour = rollout[keys.LOC], rollout[keys.BEHAVIOUR_LOC]
        weight = rollout[_WEIGHT]
        gained = (weight - 1) * gaussian.log_ratio(action, loc, behaviour, scale)
        loss = (gaussian.kl(behaviour, loc, scale) - gained).sum(1).mean()
        second_moment = group_mean(weight[:, 0].square(), condition_index(rollout))
        return TensorDict({"loss_rwr": loss, "ess": (1 / second_moment).mean()}, batch_size=[])


def _normalised(log_weight: Tensor, index: Tensor) -> Tensor:
    """Weights [B] that average 1 over every group, from logarithms [B] and groups [B]."""
    largest = log_weight.new_zeros(int(index.max()) + 1)
    largest = largest.scatter_reduce(0, index, log_weight, "amax", include_self=False)
    weight = (log_weight - largest[index]).exp()
    return weight / group_mean(weight, index)
