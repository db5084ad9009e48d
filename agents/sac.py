r"""SAC: soft actor-critic, TorchRL's loss module on the denoising chain, off the policy.

Objectives, for two soft action values Q_1, Q_2 and the policy. Q is the smaller of the two at every
point, a' a new action of the present policy at the latents of stored episodes, s' the state after
(s_k, a_k), and Q_bar are target values that follow Q slowly:

    critics:  E[ sum_i (Q_i(s_k, a_k) - target)^2 ],
              target = Q_bar(s', a') - log_ratio(a' | s'), and r(sample, y) after the last step,
    policy:   E[ log_ratio(a' | s_k) - Q(s_k, a') ],

averaged over steps and episodes, where log_ratio(a | s) = log pi(a | s) - log p_ref(a | s). This is
the stock loss at temperature 1 nat, without discount. Where the stock loss has log pi, a density
with respect to volume, it gets pi's density with respect to the prior's step: the entropy is then
-KL, SAC maximises the return J = E[ r - sum_k KL_k ], and rewards stay the same. Densities of
volume would give the same after adding log p_ref(a | s) to every reward, but lose digits: both are
large numbers where scale is small, and the log-ratio is one sum of differences.

The transition is deterministic: the action becomes the latent, so Q(s_k, a) = v_{k+1}(a), with
v_K = r. That is built in: a critic is a network of soft values evaluated at the next latent. The
policy's gradient reaches it through v, not through the reward, which need not be differentiable.

Nothing is drawn here: a' = loc + (action - behaviour_loc), the present mean plus the noise of the
stored step. That noise is independent of the latent before it, so a' is a sample of pi; on the
policy's own episodes it is the stored action.

References: Haarnoja, Zhou, Abbeel, Levine, "Soft Actor-Critic", ICML 2018, arXiv 1801.01290;
Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905 (no value
network besides Q). The code of the losses is `torchrl.objectives.SACLoss`.

Deviations from common practice:
- The temperature is fixed at 1 nat, since it is part of the objective J; none is tuned.
- No squashing by tanh: latents have no bounds.
- Steps come as whole episodes, drawn evenly; the targets follow once per rollout, not per step.
- The mean return c of the first rollout is subtracted from every episode's reward, so Q, lower by c
  everywhere, starts where returns are. J and its optimum do not change.

Metrics: `loss_actor` nats per step; `loss_qvalue` sum of the critics' mean squared errors, nats
squared; `entropy` mean of -log_ratio(a' | s_k) over steps, nats: an estimate of -KL.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import TensorDict, cat
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.critics import FirstReturn
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.errors import ConfigError

_NOISE = "noise"


class StepLaw(Distribution):
    """N(loc, scale^2 I) of one step, with its density relative to the prior's N(prior_loc, .).

    Args:
        loc: [*B, *S] mean.
        scale: [*B].
        prior_loc: [*B, *S].
        noise: [*B, *S], the draw from N(0, scale^2 I) that `rsample` adds to loc.
    """

    arg_constraints: dict[str, Constraint] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, prior_loc: Tensor, noise: Tensor) -> None:
        self.loc, self.scale, self.prior_loc, self.noise = loc, scale, prior_loc, noise
        super().__init__(scale.shape, loc.shape[scale.ndim :], validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """The only sample: [*B, *S]."""
        return self.loc + self.noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of pi's density over the prior's at `value` [*B, *S]: [*B] nats."""
        return gaussian.log_ratio(value, self.loc, self.prior_loc, self.scale)


class NextLatentValue(nn.Module):
    """Q(s_k, a) = v(a, k + 1, y), by a network of soft values v."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, action: Tensor, step: Tensor, control: TensorDict) -> Tensor:
        """Soft action values [*B, 1] of actions [*B, *S] at steps [*B] for values [*B] each."""
        value: Tensor = self.critic(action, step + 1, dict(control.items()))
        return value[..., None]


class Sac(Agent):
    """A soft actor-critic loss module of TorchRL, fed with rollouts.

    Args:
        task: for the networks of soft values.
        critic: makes v from the task, see `critics.ValueNetwork`; called once per critic.
        num_critics: how many, 2 or more; the policy and the targets see the smallest value.
        objective: class of the loss module, `torchrl.objectives.SACLoss`.
        target_update: class that moves the loss module's target networks,
            `torchrl.objectives.SoftUpdate`.
        target_rate: how far they go towards the critics per rollout, above 0 and up to 1.
        replay: how many past episodes are drawn from; 0 learns from the policy's own only.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.

    Raises:
        ConfigError: fewer than two critics, or a rate out of range.
    """

    def __init__(
        self,
        *,
        task: TaskSpec,
        critic: Callable[[TaskSpec], nn.Module],
        objective: Callable[..., Any],
        target_update: Callable[..., Any],
        target_rate: float = 0.1,
        num_critics: int = 2,
        replay: int = 2048,
        epochs: int = 2,
        minibatches: int = 1,
    ) -> None:
        super().__init__()
        if not num_critics >= 2:
            raise ConfigError(
                f"agent.num_critics={num_critics} must be 2 or more, of which the smallest counts"
            )
        if not 0 < target_rate <= 1:
            raise ConfigError(f"agent.target_rate={target_rate} must be > 0 and at most 1")
        self.first_return = FirstReturn()
        self.plan = RolloutPlan(
            gradients="score", replay=replay, epochs=epochs, minibatches=minibatches
        )
        actor = ProbabilisticTensorDictModule(
            in_keys=[keys.LOC, keys.SCALE, keys.PRIOR_LOC, _NOISE],
            out_keys=[keys.ACTION],
            distribution_class=StepLaw,
            return_log_prob=True,
        )
        critics = [
            TensorDictModule(
                NextLatentValue(critic(task)),
                in_keys=[keys.ACTION, keys.STEP, keys.CONTROL],
                out_keys=["state_action_value"],
            )
            for _ in range(num_critics)
        ]
        self.objective = objective(
            actor,
            critics,  # a list, as copies of one network would get new initial weights
            num_qvalue_nets=num_critics,
            fixed_alpha=True,
            alpha_init=1.0,  # nats: the temperature of J
            target_entropy=0.0,  # unused by a fixed temperature
            loss_function="l2",  # its minimum is a mean, as a soft value is
        )
        self.objective.make_value_estimator(gamma=1.0)
        _ = self.objective.target_entropy  # becomes a buffer when first read; a checkpoint has it
        self.target_update = target_update(self.objective, tau=target_rate)

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Let Q start at the first return, and the target networks follow the critics."""
        self.first_return.start_from(rollout)
        self.target_update.step()
        return rollout

    def loss(self, rollout: TensorDict) -> TensorDict:
        """The loss module's losses on the transitions of the episodes."""
        losses = self.objective(_transitions(rollout, self.first_return.value))
        return losses.select("loss_actor", "loss_qvalue", "entropy")


def _transitions(rollout: TensorDict, offset: Tensor) -> TensorDict:
    """States, actions and, under "next", the states after them: [B, K].

    The entry after the last step is no state and is masked by `done`. The offset is subtracted from
    the reward once per episode, and thereby from Q.
    """
    kept = (keys.LOC, keys.SCALE, keys.PRIOR_LOC, keys.ACTION, keys.STEP, keys.CONTROL)
    now = rollout.select(*kept)
    now.set(_NOISE, rollout[keys.ACTION] - rollout[keys.BEHAVIOUR_LOC])
    following = cat([now[:, 1:], now[:, -1:]], dim=1)
    done = rollout[keys.NEXT_DONE]
    following.set(keys.REWARD, rollout[keys.NEXT_REWARD] - offset * done)
    following.set("done", done)
    following.set("terminated", done)
    return now.set("next", following)
