r"""Nabla-DB: detailed balance between gradients, residual to the reward's gradient.

At the soft optimum log pi(a|s) - log p_ref(a|s) = v_{k+1}(a) - v_k(s) at all s and a. Its gradients
in a and in s are two constraints on the policy and on h_k(x) = grad v_k(x) that do not contain v:

    forward:    (loc_k - prior_loc_k) / scale_k^2 = h_{k+1}(a),
    reverse:    - grad_s [ log pi(a|s) - log p_ref(a|s) ] = h_k(s),
    terminal:   h_K(x) = grad_x r(sample(x), y).

The gradient of the flow is modelled as h_k(x) = grad_x r(x_hat(x, k), y) + g(x, k, y). x_hat is the
prior's one-step estimate of the clean sample, with which the terminal constraint holds for g = 0 at
k = K; g is a network that starts at 0. Objective, minimised on rollouts of the policy, in squared
standard deviations of a step, which are nats:

    E_pi[ sum_k scale_k^2 / 2 | (loc_k - prior_loc_k) / scale_k^2 - h_{k+1}(a_k) |^2 ]     over pi,
    E_pi[ sum_{0 < k < K} scale_{k-1}^2 / 2 | h_k(x_k) + grad_s log_ratio_k |^2 ]          over g.

Any policy with a matching g would meet the forward constraint alone. The reverse one ties h_k to
the policy's drift at step k, and so, step by step, to the reward.

Reference: Liu, Xiao, Liu, Bengio, Zhang, "Efficient Diversity-Preserving Diffusion Alignment via
Gradient-Informed GFlowNets", ICLR 2025, arXiv 2412.07775 (residual nabla-DB).

Deviations from the paper:
- Each loss trains one side: the forward one the policy, towards h; the reverse one h, towards the
  policy. The paper lets both train both. The reverse one would then need second derivatives of the
  policy, and a g that yields to the forward loss adopts anything the policy happens to do.
- The one-step estimate is the prior's, not the policy's, and its gradient is not scaled down at
  early steps: g corrects it.
- The weights scale^2 / 2 and no clipping of gradients.

A fixed-scale policy meets the constraints only in the mean over actions, and that is the fixed
point of both regressions: loc_k - prior_loc_k = scale_k^2 E_pi[h_{k+1}(a_k)] and
h_k(x_k) = (d prior_loc_k / d x_k)^T E_pi[h_{k+1}(a_k)]. So h_k is the mean of the lean adjoint a_k,
and the fixed point is that of `adjoint`, with a network in place of single trajectories.

Metrics: `loss_nabla_db` the forward objective, nats; `loss_flow` the reverse one, nats;
`flow_gradient` root mean square over steps of scale_k |h_{k+1}|, the requested drift, in standard
deviations of a step.
"""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import nn

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.adjoints import log_ratio_gradient, reward_gradient
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.gaussian import expand_to

_REWARD = "reward_gradient"  # [B, K, *S], at step k that of the one-step estimate at the action
_TARGET = "flow_target"  # [B, K, *S], at step k the target of g at the action, 0 at the last step


class NablaDB(Agent):
    """Residual detailed balance of gradients.

    Args:
        task: for the network and the number of steps.
        critic: makes g from the task, see `ctrl_rl.agents.parts.critics.GradientNetwork`.
    """

    needs_reward_gradient = True
    plan = RolloutPlan(gradients="score")

    def __init__(self, *, task: TaskSpec, critic: Callable[[TaskSpec], nn.Module]) -> None:
        super().__init__()
        self.critic, self.num_steps = critic(task), task.num_steps

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Add both gradients, the reverse constraint's at the step whose action it concerns."""
        of_reward = reward_gradient(chain, rollout)
        reverse = -log_ratio_gradient(chain, rollout)[:, 1:]
        target = torch.zeros_like(of_reward)
        target[:, :-1] = reverse - of_reward[:, :-1]
        return rollout.copy().set(_REWARD, of_reward).set(_TARGET, target)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Forward loss for the policy and reverse loss for g, summed over steps."""
        scale = expand_to(rollout[keys.SCALE], rollout[keys.LOC])
        following, control = rollout[keys.STEP] + 1, dict(rollout[keys.CONTROL].items())
        residual = self.critic(rollout[keys.ACTION], following, control)
        residual = residual * expand_to(following < self.num_steps, residual)
        asked = scale * (rollout[_REWARD] + residual.detach())
        drift = (rollout[keys.LOC] - rollout[keys.PRIOR_LOC]) / scale
        twice = 2 * len(rollout)
        return TensorDict(
            {
                "loss_nabla_db": (drift - asked).square().sum() / twice,
                "loss_flow": (scale * (residual - rollout[_TARGET])).square().sum() / twice,
                "flow_gradient": asked.flatten(2).square().sum(2).mean().sqrt(),
            },
            batch_size=[],
        )
