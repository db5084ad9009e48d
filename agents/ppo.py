r"""PPO: several clipped policy-gradient steps per rollout (DDPO-IS with the soft return).

Objective, maximised over the policy's parameters:

    J(pi) = E_pi[ r(sample, y) - sum_k KL_k ],   KL_k = KL(pi(. | s_k) || p_ref(. | s_k))   [nats]

A rollout of the acting policy pi_b is used for epochs * minibatches optimizer steps, each on

    sum_k D min( A_k rho_k, A_k clip(rho_k, 1 - clip, 1 + clip) ) - KL_k,
    rho_k = ( pi(a_k | s_k) / pi_b(a_k | s_k) )^(1/D),

with D the number of dimensions of a latent. Since D d rho = rho d log pi, the gradient at pi = pi_b
is sum_k A_k grad log pi - grad KL_k: exactly the policy gradient of J, in nats, for any D. (Without
the factor D the reward would have 1/D of the KL's weight.) The ratio is per dimension because the
joint one is e to the power of a sum over D terms: it overflows or vanishes for images as soon as
every dimension has moved a little. The clip is in the same unit: it lets log pi of one step move by
about D * clip nats in the direction of the advantage.

The advantage A_k is formed once per rollout, without a graph. Without a critic it is G_{k+1} minus
its mean over the other episodes with the same condition, where G_k = r - sum_{j >= k} KL_j. With a
critic V(x_k, k, y) it is the generalised advantage estimate of the gains r_k - KL_k (r_k = r at the
last step, else 0), and V is fitted to A_k + V_k, half the squared error averaged over steps. The
ratio is then weighed by A_k minus its mean over the other episodes with the same condition: V is
never quite up to date, and an error shared by all episodes would push the policy away from all of
them. V starts at the mean return of the first rollout (`OffsetByFirstReturn`).

References: Black, Janner, Du, Kostrikov, Levine, "Training Diffusion Models with Reinforcement
Learning", ICLR 2024, arXiv 2305.13301 (DDPO-IS); Schulman, Wolski, Dhariwal, Radford, Klimov,
"Proximal Policy Optimization Algorithms", 2017, arXiv 1707.06347, eq. 7; Schulman, Moritz, Levine,
Jordan, Abbeel, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", ICLR
2016, arXiv 1506.02438.

Deviations from DDPO-IS:
- The KL to the prior is part of the objective and differentiated in closed form at every state.
  Only the KLs that follow an action, and no KL estimated from actions, enter its advantage.
- A step is credited with what follows it only, instead of the whole episode's reward.
- Advantages are not divided by their standard deviation. That would multiply the reward by 1 / std
  and leave the KL unchanged: another temperature, and a different one for every condition.
  (Dividing advantage and KL by one number for the whole batch would be sound; Adam does so
  already.)

Metrics: `loss_ppo` the surrogate (its value means nothing); `advantage_std` nats; `clip_fraction`
share of steps whose gradient the clip stops; `behaviour_kl` KL(pi || pi_b) of a step, nats; with a
critic `loss_critic`, nats squared, and `explained_variance` of its targets.
"""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import nn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.advantages import (
    centred,
    check_clip,
    clipped_surrogate,
    generalized_advantage,
    step_advantage,
)
from ctrl_rl.agents.parts.critics import OffsetByFirstReturn, state_values, value_regression
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.errors import ConfigError

_ADVANTAGE, _TARGET = "advantage", "value_target"


class Ppo(Agent):
    """Clipped importance-weighted policy gradient of the soft return.

    Args:
        task: shapes and controls, for the critic.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.
        step_chunks: pieces along time that are differentiated one by one, to save memory.
        clip: how far the ratio per dimension may move from 1 and still gain, in (0, 1).
        critic: makes the value network from the task; None for the mean per condition.
        gae_lambda: of the generalised advantage estimate, 0 to 1; for a critic only.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        task: TaskSpec,
        epochs: int = 2,
        minibatches: int = 2,
        step_chunks: int = 1,
        clip: float = 0.1,
        critic: Callable[[TaskSpec], nn.Module] | None = None,
        gae_lambda: float = 0.95,
    ) -> None:
        super().__init__()
        if not 0 <= gae_lambda <= 1:
            raise ConfigError(f"agent.gae_lambda={gae_lambda} must be from 0 to 1")
        self.plan = RolloutPlan(
            gradients="score", epochs=epochs, minibatches=minibatches, step_chunks=step_chunks
        )
        self.clip, self.gae_lambda = check_clip(clip), gae_lambda
        self.num_steps = task.num_steps
        self.critic = None if critic is None else OffsetByFirstReturn(critic(task))

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add advantages, and the critic's targets."""
        if self.critic is None:
            return rollout.copy().set(_ADVANTAGE, step_advantage(rollout))
        self.critic.start_from(rollout)
        gains = (rollout[keys.NEXT_REWARD][..., 0] - rollout[keys.KL]).detach()
        with torch.no_grad():
            values = state_values(self.critic, rollout)
        advantage = generalized_advantage(gains, values, self.gae_lambda)
        prepared = rollout.copy().set(_TARGET, advantage + values)
        return prepared.set(_ADVANTAGE, centred(advantage, rollout))

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative surrogate, and the critic's error."""
        advantage = rollout[_ADVANTAGE]
        surrogate, figures = clipped_surrogate(rollout, advantage, self.clip)
        result = {
            "loss_ppo": (rollout[keys.KL] - surrogate).sum(1).mean(),
            "advantage_std": advantage.std(),
            **figures,
        }
        if self.critic is not None:
            result |= value_regression(self.critic, rollout, rollout[_TARGET], self.num_steps)
        return TensorDict(result, batch_size=[])
