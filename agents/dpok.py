r"""DPOK: the KL-regularised policy gradient with a learned baseline.

Objective, maximised over the policy's parameters:

    J(pi) = E_pi[ r(sample, y) - sum_k KL_k ],   KL_k = KL(pi(. | s_k) || p_ref(. | s_k))   [nats]

Its gradient, with the soft return to go G_k = r - sum_{j >= k} KL_j and a value network V,

    grad J = E_pi[ sum_k (G_k - V(x_k, k, y)) grad log pi(a_k | s_k) - grad KL_k(s_k) ].

V is fitted to G_k by least squares along with the policy: half the squared error, averaged over
steps. KL_k is a function of the state, so G_k - V estimates the advantage of a_k although G_k
contains KL_k. V is that of earlier updates and leaves the gradient unbiased, however bad it is. V
can know what a mean per condition cannot: how much of the return the latent has already decided.

By default there is one optimizer step per rollout. With more, G_k - V weighs the clipped ratio of
`clipped_surrogate` in place of log pi.

Reference: Fan, Watkins, Du, Liu, Ryu, Boutilier, Abbeel, Ghavamzadeh, K. Lee, K. Lee, "DPOK:
Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", NeurIPS 2023, arXiv
2305.16381.

Deviations from the authors' published code:
- The KL is the closed form, |loc - prior_loc|^2 / (2 scale_k^2) summed over dimensions; theirs is
  the mean squared difference of the two noise predictions, which weighs the steps differently.
- An action is charged with the KLs that follow it. Theirs differentiates the penalty at every state
  and ignores that actions choose the states, so its gradient is not that of reward - KL.
- V is fitted to the soft return to go, theirs to the final reward, and starts at the mean return of
  the first rollout (`OffsetByFirstReturn`).
- G_k - V is centred: at every step its mean over the other episodes with the same condition is
  subtracted. V is never quite up to date, and an error shared by all episodes would push the policy
  away from everything it did. V still has to know what tells the episodes of a condition apart.
- Reward and KL have weight 1 each, in nats; the reward's weight is `env.guidance_strength`.
- One optimizer step per rollout by default; theirs makes several. Several steps use PPO's minimum
  of clipped and free ratio; theirs clamps the ratio, which also stops the gradient of an action
  whose probability went the wrong way.

Metrics: `loss_dpok` the surrogate (its value means nothing); `loss_critic` nats squared;
`advantage_std` standard deviation of G_k - V, nats; `explained_variance` share of the variance of
G_k that V explains; `clip_fraction` share of steps whose gradient the clip stops; `behaviour_kl`
KL(pi || pi_b) of a step, nats, 0 for one optimizer step.
"""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import nn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.advantages import centred, check_clip, clipped_surrogate, returns_to_go
from ctrl_rl.agents.parts.critics import OffsetByFirstReturn, state_values, value_regression
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec

_ADVANTAGE, _RETURN = "advantage", "return_to_go"


class Dpok(Agent):
    """Score-function gradient of the soft return with a value network as its baseline.

    Args:
        task: shapes and controls, for the critic.
        critic: makes the value network from the task.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.
        step_chunks: pieces along time that are differentiated one by one, to save memory.
        clip: with several optimizer steps per rollout, how far the ratio per dimension may move
            from 1 and still gain, in (0, 1).

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        task: TaskSpec,
        critic: Callable[[TaskSpec], nn.Module],
        epochs: int = 1,
        minibatches: int = 1,
        step_chunks: int = 1,
        clip: float = 0.1,
    ) -> None:
        super().__init__()
        self.plan = RolloutPlan(
            gradients="score", epochs=epochs, minibatches=minibatches, step_chunks=step_chunks
        )
        self.clip = check_clip(clip)
        self.num_steps = task.num_steps
        self.critic = OffsetByFirstReturn(critic(task))

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add returns to go, and advantages over the critic before the update."""
        self.critic.start_from(rollout)
        returns = returns_to_go(rollout)
        with torch.no_grad():
            advantage = centred(returns - state_values(self.critic, rollout), rollout)
        return rollout.copy().set(_RETURN, returns).set(_ADVANTAGE, advantage)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative surrogate, and the critic's error."""
        advantage = rollout[_ADVANTAGE]
        surrogate, figures = clipped_surrogate(rollout, advantage, self.clip)
        return TensorDict(
            {
                "loss_dpok": (rollout[keys.KL] - surrogate).sum(1).mean(),
                "advantage_std": advantage.std(),
                **figures,
                **value_regression(self.critic, rollout, rollout[_RETURN], self.num_steps),
            },
            batch_size=[],
        )
