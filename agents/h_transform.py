r"""Doob's h-transform: learn the prior's soft values of all conditions, climb them, then drop them.

The soft-optimal policy tilts every step of the prior by where it leads (Doob's h-transform),

    pi*(a | s_k) = p_ref(a | s_k) e^{v_{k+1}(a, y)} / E_ref[ e^{v_{k+1}} ],
    v_k(x, y) = log h_k(x, y) = log E_ref[ e^{r(sample, y)} | x_k = x ]   [nats],

and v depends on the prior alone: it can be learned without a policy that acts.

1. For the first `value_share` of training the prior acts and the values are fitted. Let
w_y = e^{r(sample, y) - c} and w their sum over conditions. A network gives logits of conditions,
with softmax q, and a logarithm g of the sum. On every latent of an episode it minimises

    E_ref[ -sum_y w_y log q_y(x_k)  +  w softplus(-g(x_k)) + softplus(g(x_k)) ],

a classifier of noisy latents, plus a logistic regression that tells weighted from unweighted
episodes. The minimum has q_y e^g = E_ref[w_y | x_k], so v_y = c + g + log q_y for any reward. Where
the e^r of all conditions sum to 1 (every control by a classifier, guidance strength 1), g = 0 is
exact from the start. c is the log-mean of the first update's sums and only keeps w near 1. Every
episode teaches the values of all conditions. The values used are those of a moving average of the
network, whose gradient in x is smoother than that of the network itself.

2. Then the values are frozen and the policy acts. At every state it visits it maximises

    E_eps[ v_{k+1}(loc_k + scale_k eps, y) ] - KL_k,   eps ~ N(0, I),

by the gradient in loc_k: the KL(pi || pi*) of each step separately. No gradient passes from one
step to the one before, so a rollout serves for several optimizer steps and gradients do not grow
along the chain; the error of v remains. At fixed scale the optimum has loc_k where that expression
is largest: the optimum of J where v is linear, close to it where steps are short.

3. For the last `reward_share` of training the values are dropped and the policy maximises J itself,

    J(pi) = E_pi[ r - sum_k KL_k ],

through the whole chain, as `ctrl` does. That gradient is free of the values' errors; its noise
matters less at the low learning rate of a run's end. With reward_share = 0 the reward is only ever
queried and need not be differentiable.

References: h-transform: Doob, "Classical Potential Theory and Its Probabilistic Counterpart",
Springer 1984; as the optimal control of a diffusion model: Denker et al., "DEFT: Efficient
Fine-tuning of Diffusion Models by Learning the Generalised h-transform", NeurIPS 2024, arXiv
2406.01781; gradients of values of noisy actions: Heess et al., "Learning Continuous Control
Policies by Stochastic Value Gradients", NeurIPS 2015, arXiv 1510.09142, SVG(0); logistic regression
as a ratio of densities: Sugiyama, Suzuki, Kanamori, "Density Ratio Estimation in Machine Learning",
Cambridge 2012; a classifier of noisy latents as guidance: Dhariwal, Nichol, "Diffusion Models Beat
GANs on Image Synthesis", NeurIPS 2021, arXiv 2105.05233.

Deviations: the papers on value gradients learn the value of the present policy. This is the value
of the optimal policy, known from the prior, and it is not bootstrapped from later values.

Metrics: `loss_value` the values' objective, nats, in the first part; `loss_h_transform` the
policy's, nats, in the second; `soft_value` mean of v where the policy's actions lead, nats;
`loss_soft_return` = -J, nats, in the third.
"""

import math
from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain, Phase
from ctrl_rl.agents.parts.returns import mean_soft_return
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.conditions import joint_place, label_counts
from ctrl_rl.errors import ConfigError

_REWARDS = "condition_rewards"  # [B, K, C] nats, repeated along the steps


class HTransform(Agent):
    """Gradient of learned soft values, one step at a time.

    Args:
        task: its controls.
        critic: makes the network of g and logits, see `critics.ConditionValues`.
        value_share: share of training that learns values, more than 0 and less than 1.
        reward_share: share of training, at its end, that follows the reward through the whole
            chain, 0 for none; less than 1 - value_share.
        average: share of the values' moving average that an update keeps, in [0, 1); the average is
            even over the first updates.
        value_minibatches: optimizer steps per rollout of the prior.
        epochs: passes over every rollout of the policy.
        minibatches: optimizer steps per pass.

    Raises:
        ConfigError: a value out of range.
    """

    log_scale: Tensor
    started: Tensor

    def __init__(
        self,
        *,
        task: TaskSpec,
        critic: Callable[[TaskSpec], nn.Module],
        value_share: float = 0.25,
        reward_share: float = 0.25,
        average: float = 0.95,
        value_minibatches: int = 4,
        epochs: int = 1,
        minibatches: int = 4,
    ) -> None:
        super().__init__()
        if not 0 < value_share < 1:
            raise ConfigError(f"agent.value_share={value_share} must be between 0 and 1")
        if not 0 <= reward_share < 1 - value_share:
            raise ConfigError(
                f"agent.reward_share={reward_share} must be 0 or more, and less than what "
                f"agent.value_share={value_share} leaves"
            )
        if not 0 <= average < 1:
            raise ConfigError(f"agent.average={average} must be 0 or more and less than 1")
        self.plan = RolloutPlan(gradients="score", epochs=epochs, minibatches=minibatches)
        self.of_values, self.of_reward = _ValueFit(self, value_minibatches), _RewardAscent()
        self.value_share, self.reward_share = value_share, reward_share
        if keys.PROMPT in task.controls:
            raise ConfigError(
                "agent=h_transform learns soft values of a prior without prompts, and this one has "
                "prompts; use agent=ctrl, or any other agent"
            )
        self.sizes, self.critic = label_counts(task.controls), critic(task)
        self.followed = AveragedModel(self.critic, avg_fn=_moving_average(average))
        self.followed.requires_grad_(False)
        self.register_buffer("log_scale", torch.tensor(0.0))  # c, nats, set by `prepare`
        self.register_buffer("started", torch.tensor(False))

    @property
    def phases(self) -> Mapping[float, Phase]:
        """The prior's episodes for the values, then the policy's, finally whole chains."""
        phases: dict[float, Phase] = {0.0: self.of_values, self.value_share: self}
        return phases | ({1 - self.reward_share: self.of_reward} if self.reward_share else {})

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Shear the rollout, see `_sheared`."""
        return _sheared(rollout)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """KL of the steps minus the soft values of where they lead, per episode."""
        # The rollout's own noise, added to the present mean.
        action = rollout[keys.ACTION] + rollout[keys.LOC] - rollout[keys.BEHAVIOUR_LOC]
        total, log_share = _parts(self.followed(action, rollout[keys.STEP] + 1))
        condition = joint_place(self.sizes, dict(rollout[keys.CONTROL].items()))
        condition = condition.to(action.device).expand(rollout.shape)  # 0 without any control
        own = log_share.gather(-1, condition[..., None])[..., 0]
        values = self.log_scale + total + own
        loss = (rollout[keys.KL] - values).sum(1).mean()
        result = {"loss_h_transform": loss, "soft_value": values.detach().mean()}
        return TensorDict(result, batch_size=[])

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The network of soft values, frozen once it has learned the prior's."""
        return {"values": list(self.critic.parameters())}


class _ValueFit(Phase):
    """The first part: the prior acts, and its soft values under all conditions are fitted.

    Args:
        agent: owns the network and its average.
        minibatches: optimizer steps per rollout.
    """

    def __init__(self, agent: HTransform, minibatches: int) -> None:
        self.agent = agent
        self.plan = RolloutPlan(gradients=None, behaviour="prior", minibatches=minibatches)

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Reward episodes under every condition; update the average; set c by the first ones."""
        agent, rewards = self.agent, _condition_rewards(chain, rollout[keys.SAMPLE][:, 0])
        if not agent.started:
            sums = rewards.logsumexp(1)
            agent.log_scale.copy_(sums.logsumexp(0) - math.log(len(sums)))
            agent.started.fill_(True)
        agent.followed.update_parameters(agent.critic)
        repeated = rewards[:, None].expand(-1, rollout.shape[1], -1)
        return _sheared(rollout.copy().set(_REWARDS, repeated))

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Cross-entropy of conditions on noisy latents, and the logistic regression of the sum."""
        total, log_share = _parts(self.agent.critic(rollout[keys.ACTION], rollout[keys.STEP] + 1))
        weights = (rollout[_REWARDS] - self.agent.log_scale).exp()
        weight = weights.sum(-1)
        which = -(weights * log_share).sum(-1)
        how_much = weight * softplus(-total) + softplus(total)
        return TensorDict({"loss_value": (which + how_much).mean()}, batch_size=[])


class _RewardAscent(Phase):
    """The last part: J itself, through the whole chain."""

    plan = RolloutPlan(gradients="pathwise")

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative soft return, averaged over episodes."""
        return TensorDict({"loss_soft_return": -mean_soft_return(rollout)}, batch_size=[])


@torch.no_grad()
def _condition_rewards(chain: Chain, sample: Tensor) -> Tensor:
    """Rewards of clean samples [B, *D] under every condition, in one call: [B, C] nats.

    The reward of a prior's episode under a condition does not depend on the one it was drawn for.
    """
    conditions = chain.conditions
    control = {
        name: torch.tensor([c[name] for c in conditions], device=sample.device).repeat(len(sample))
        for name in conditions[0]
    }
    copies = sample.repeat_interleave(len(conditions), 0)
    return chain.reward(copies, control).reshape(len(sample), len(conditions))


def _sheared(rollout: TensorDict) -> TensorDict:
    """Give row i step k of episode i + k: a minibatch of a few rows has states of many episodes.

    What the first two parts learn about a state does not depend on the rest of its episode.
    """
    episodes, steps = (torch.arange(size, device=rollout.device) for size in rollout.shape)
    kept = rollout.exclude(keys.CLEAN, keys.SAMPLE)
    return kept[(episodes[:, None] + steps) % len(episodes), steps]


def _parts(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms g [*N] and log q [*N, C] from a critic's outputs [*N, 1 + C]."""
    return outputs[..., 0], outputs[..., 1:].log_softmax(-1)


def _moving_average(keep: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential moving average that starts as an even one, to forget where it began."""

    def average(averaged: Tensor, present: Tensor, updates: Tensor | int) -> Tensor:
        share = max(1 - keep, 1 / (int(updates) + 1))
        return averaged.lerp(present, share)

    return average
