r"""GRPO: clipped policy-gradient steps with one group-relative advantage per trajectory.

Objective, maximised over the policy's parameters, with `advantage=soft_return`:

    J(pi) = E_pi[ r(sample, y) - sum_k KL_k ],   KL_k = KL(pi(. | s_k) || p_ref(. | s_k))   [nats]

A group is all episodes of the batch with the same condition. All steps of a trajectory share

    A = R - mean of R over the other episodes of the group,    R = r - sum_k KL_k,

and every optimizer step is on

    sum_k D min( A rho_k, A clip(rho_k, 1 - clip, 1 + clip) ) - KL_k,
    rho_k = ( pi(a_k | s_k) / pi_b(a_k | s_k) )^(1/D),

with pi_b the acting policy and D the number of dimensions (why: `clipped_surrogate`). At pi = pi_b
its gradient is an unbiased estimate of grad J: the KLs before step k in R do not depend on a_k and
only add variance. GRPO differs from PPO in having no value network and no credit per step.

With `advantage=reward_over_std` it is the paper's

    A = (r - mean of r over the group) / standard deviation of r over the group,

which optimises something else. Roughly, r / std_y takes the place of r, with std_y the spread of
the reward under the present policy: the temperature is std_y nats instead of 1, differs between
conditions and changes with the policy, and `env.guidance_strength` cancels out. The effect of an
action on the KL of later steps is left out too. Its gap is therefore no measure of how well it
optimises.

References: Shao et al., "DeepSeekMath", 2024, arXiv 2402.03300; on denoising chains: Liu et al.,
"Flow-GRPO", 2025, arXiv 2505.05470, and Xue et al., "DanceGRPO", 2025, arXiv 2505.07818; without
the division by the standard deviation: Liu et al., "Understanding R1-Zero-Like Training", 2025,
arXiv 2503.20783 (Dr. GRPO).

Deviations from Flow-GRPO:
- By default the return includes the KLs and is not divided by a standard deviation, see above.
- The mean leaves one out: the group's own mean shrinks the reward's gradient by 1 - 1/n against the
  KL's.
- The KL is a sum over dimensions with weight 1, in closed form, as everywhere in this project.

Metrics: `loss_grpo` the surrogate (its value means nothing); `group_std` root mean square over
episodes of the group's standard deviation of R (or of r), nats; `clip_fraction` share of steps
whose gradient the clip stops; `behaviour_kl` KL(pi || pi_b) of a step, nats.
"""

from typing import Literal

from tensordict import TensorDict

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.advantages import (
    check_clip,
    clipped_surrogate,
    condition_index,
    group_mean,
    group_std,
    leave_one_out_mean,
)
from ctrl_rl.agents.parts.returns import episode_kl, episode_reward
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.errors import check_choice

_ADVANTAGE, _SPREAD = "advantage", "group_std"
_KINDS = ("soft_return", "reward_over_std")


class Grpo(Agent):
    """Clipped importance-weighted policy gradient with group-relative advantages.

    Args:
        advantage: `soft_return` for the soft objective, `reward_over_std` for the paper's.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass.
        step_chunks: pieces along time that are differentiated one by one, to save memory.
        clip: how far the ratio per dimension may move from 1 and still gain, in (0, 1).

    Raises:
        ConfigError: a value out of range.
    """

    needs_equal_conditions = True

    def __init__(
        self,
        *,
        advantage: Literal["soft_return", "reward_over_std"] = "soft_return",
        epochs: int = 2,
        minibatches: int = 2,
        step_chunks: int = 1,
        clip: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("agent.advantage", advantage, _KINDS)
        self.plan = RolloutPlan(
            gradients="score", epochs=epochs, minibatches=minibatches, step_chunks=step_chunks
        )
        self.advantage, self.clip = advantage, check_clip(clip)

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add every trajectory's advantage, the same at all of its steps."""
        group = condition_index(rollout)
        gain = episode_reward(rollout).detach()
        if self.advantage == "soft_return":
            gain = gain - episode_kl(rollout).detach()
        spread = group_std(gain, group)
        if self.advantage == "soft_return":
            relative = gain - leave_one_out_mean(gain, group)
        else:
            relative = (gain - group_mean(gain, group)) / spread.clamp(min=1e-6)
        steps = rollout.batch_size
        added = {
            _ADVANTAGE: relative[:, None].expand(steps),
            _SPREAD: spread[:, None].expand(steps),
        }
        return rollout.copy().update(added)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Negative surrogate."""
        surrogate, figures = clipped_surrogate(rollout, rollout[_ADVANTAGE], self.clip)
        return TensorDict(
            {
                "loss_grpo": (rollout[keys.KL] - surrogate).sum(1).mean(),
                "group_std": rollout[_SPREAD].square().mean().sqrt(),
                **figures,
            },
            batch_size=[],
        )
