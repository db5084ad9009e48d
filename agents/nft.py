r"""NFT: negative-aware fine-tuning on the forward process, a regression on noised samples.

An episode's sample z is noised anew, independently for every step (`ctrl_rl.agents.parts.noising`),
which gives a latent x_k and the mean m_k of x_{k+1} given x_k and z. With an optimality o in [0, 1]
of the sample, the acting policy pi_b, and, in standard deviations of the step,
d = (loc_k - behaviour_loc_k) / scale_k and e = (m_k - behaviour_loc_k) / scale_k, the loss is

    limit / (2 beta) E[ sum_k o |beta d - e|^2 + (1 - o) |beta d + e|^2 ],
    o = (1 + B / limit) / 2,    B = A + consistency, cut to +- limit.

Good samples attract and bad ones repel. Multiplied out this is E[ sum_k beta limit |d|^2 / 2
- B d . e ] up to a constant: it asks for d = E[B e | x_k] / (beta limit). Its gradient at
pi = pi_b, -E[ sum_k B e . grad d ], contains neither beta nor, except for the cut, limit. Both only
set how far several optimizer steps on one rollout may go.

`advantage=soft_return`: A = r - sum_k log_ratio_k of the episode, nats, minus its mean over the
batch's episodes of the condition. Fixed points have E[B e | x_k] = 0. At the soft optimum A = 0
except for the start (see `tb`). With fine steps, and noise that forgets the start, a chain and its
noised samples have one law, so e has mean 0 at every x_k: the soft optimum is a fixed point. Only
consistency > 0 makes it unique: A alone determines the law of samples and leaves open which chain
makes them, at a KL that can be any number above the least. The term consistency * e regresses the
policy on its own noised samples, hence on the one chain whose reverse is the forward process.

With few steps that chain is not the prior's: its samples are narrower than those its network was
trained on. The fixed point then lies off the soft optimum by an amount that vanishes as steps get
fine. On the gaussian task, for drifts that do not depend on the latent, it has a closed form and
the tests compare; figures are in `docs/agents/nft.md`.

`advantage=reward_over_std`, the paper's: A = (r - mean) / standard deviation of r per condition;
with limit 1 and consistency 0 the paper's optimality. Nothing ties that policy to the prior: its
only optimum is samples of the highest reward, and its gap is no measure of how well it optimises.

Reference: Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025,
arXiv 2509.16117.

Deviations:
- The regression is on the mean of the kernel's step in units of its standard deviation: the
  velocity's, with the KL's weight at every noise level.
- By default the advantage is that of the soft return, which needs the log-ratio of the rollout (the
  paper needs no likelihood at all), and consistency is added.
- The old policy is the one that acted, for all optimizer steps on its rollout, not a moving average
  of earlier ones.
- All K noise levels are taken from every sample.

Metrics: `loss_nft` (its value means nothing); `advantage_std` of A, nats, or standard deviations
of the reward; `cut_fraction` share of episodes whose B is cut; `behaviour_kl` KL(pi || pi_b) of a
step, nats, 0 for one optimizer step.
"""

import math
from typing import Literal

from tensordict import TensorDict

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.advantages import condition_index, group_mean, group_std
from ctrl_rl.agents.parts.noising import noisy_copies
from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.errors import ConfigError, check_choice
from ctrl_rl.gaussian import expand_to

_ADVANTAGE = "advantage"
_KINDS = ("soft_return", "reward_over_std")


class Nft(Agent):
    """Regression on noised samples, toward good ones and away from bad ones.

    Args:
        advantage: `soft_return` for the soft objective, `reward_over_std` for the paper's.
        consistency: weight >= 0 of a sample that is as good as the mean, in the advantage's unit.
        limit: where the weight of a sample is cut, in the advantage's unit.
        beta: shortens the step that one rollout asks for by 1 / beta.
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
        advantage: Literal["soft_return", "reward_over_std"] = "soft_return",
        consistency: float = 0.2,
        limit: float = 5.0,
        beta: float = 1.0,
        epochs: int = 1,
        minibatches: int = 1,
        step_chunks: int = 1,
    ) -> None:
        super().__init__()
        check_choice("agent.advantage", advantage, _KINDS)
        if not 0 <= consistency < math.inf:
            raise ConfigError(f"agent.consistency={consistency} must be 0 or more")
        for name, value in {"limit": limit, "beta": beta}.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"agent.{name}={value} must be > 0")
        self.advantage, self.consistency, self.limit, self.beta = (
            advantage,
            consistency,
            limit,
            beta,
        )
        self.plan = RolloutPlan(
            gradients="score",
            reevaluate=True,
            epochs=epochs,
            minibatches=minibatches,
            step_chunks=step_chunks,
        )

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add advantages, and put the noised sample in place of an episode's latents."""
        index, value = condition_index(rollout), episode_reward(rollout)
        if self.advantage == "soft_return":
            value = value - episode_log_ratio(rollout)
        advantage = value - group_mean(value, index)
        if self.advantage == "reward_over_std":
            # all rewards of a condition equal: advantages are 0, not 0 / 0
            advantage = advantage / group_std(value, index).clamp(min=1e-6)
        noised = rollout.copy().update(noisy_copies(chain, rollout))
        return noised.set(_ADVANTAGE, advantage.detach()[:, None].expand(rollout.shape))

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Squares of both signs, weighted by optimality."""
        loc, old, scale = (rollout[k] for k in (keys.LOC, keys.BEHAVIOUR_LOC, keys.SCALE))
        wide, weight = expand_to(scale, loc), rollout[_ADVANTAGE] + self.consistency
        moved, asked = self.beta * (loc - old) / wide, (rollout[keys.ACTION] - old) / wide
        optimality = (1 + (weight / self.limit).clamp(-1, 1)) / 2
        good = expand_to(optimality, loc)
        squares = good * (moved - asked).square() + (1 - good) * (moved + asked).square()
        return TensorDict(
            {
                "loss_nft": self.limit / (2 * self.beta) * squares.sum() / len(rollout),
                "advantage_std": rollout[_ADVANTAGE].std(),
                "cut_fraction": (weight.abs() > self.limit).float().mean(),
                "behaviour_kl": gaussian.kl(loc, old, scale).mean().detach(),
            },
            batch_size=[],
        )
