r"""Adjoint matching: regress the policy's drift on the reward's gradient, carried back.

Objective, minimised over the policy's parameters on rollouts of the policy itself:

    E_pi[ sum_k | (loc_k - prior_loc_k) / scale_k - scale_k a_{k+1} |^2 / 2 ]      [nats]

where a is the lean adjoint of the rollout (`ctrl_rl.agents.parts.adjoints`), a constant to the
gradient: a_K is the reward's gradient in x_K, through read-out and decoder, and before that
a_k = (d prior_loc(x_k, k) / d x_k)^T a_{k+1}. At loc = prior_loc the loss is the KL that following
the adjoint would cost.

To first order in scale_k the soft optimum has loc_k - prior_loc_k = scale_k^2 grad v_{k+1}, v being
the soft value. The regression's fixed point has the mean of a_{k+1} in place of the gradient. In
continuous time and with memoryless noise, as in ancestral sampling, the two are the same. In
discrete time they are the same where a_{k+1} is the same along every trajectory (an affine prior
with a linear reward); elsewhere they differ by the discretisation error of a step.

Reference: Domingo-Enrich, Drozdzal, Karrer, Chen, "Adjoint Matching: Fine-Tuning Flow and Diffusion
Generative Models with Memoryless Stochastic Optimal Control", ICLR 2025, arXiv 2409.08861.

Deviations from the paper:
- The chain is the scheduler's, with K Gaussian steps; the Jacobian of its mean replaces that of the
  drift in an ordinary differential equation.
- The regression uses all steps. The paper's large runs pick some of them.
- Adjoints are not clipped.

No graph spans two steps: the adjoint is carried back one step at a time, and the regression is
differentiated in pieces of `steps_at_once`. Memory for the backward pass does not grow with K.

Metrics: `loss_adjoint` the objective, nats; it stays above 0 where adjoints differ between
trajectories through one latent. `adjoint_norm` root mean square over steps of |scale_k a_{k+1}|,
the requested drift, in standard deviations of a step.
"""

import math

from tensordict import TensorDict

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent, Chain
from ctrl_rl.agents.parts.adjoints import lean_adjoint
from ctrl_rl.agents.plan import RolloutPlan, TaskSpec
from ctrl_rl.errors import ConfigError
from ctrl_rl.gaussian import expand_to

_ADJOINT = "lean_adjoint"  # [B, K, *S] nats per unit of the latent


class Adjoint(Agent):
    """Least squares on the lean adjoint.

    Args:
        task: gives the number of steps.
        steps_at_once: how many steps are differentiated together; more takes more memory, but less
            time for small networks.

    Raises:
        ConfigError: steps_at_once below 1.
    """

    needs_reward_gradient = True

    def __init__(self, *, task: TaskSpec, steps_at_once: int = 5) -> None:
        super().__init__()
        if steps_at_once < 1:
            raise ConfigError(f"agent.steps_at_once={steps_at_once} must be 1 or more")
        chunks = math.ceil(task.num_steps / steps_at_once)
        self.plan = RolloutPlan(gradients="score", step_chunks=chunks)

    def prepare(self, rollout: TensorDict, chain: Chain) -> TensorDict:
        """Carry the reward's gradient back along the prior's chain."""
        return rollout.copy().set(_ADJOINT, lean_adjoint(chain, rollout))

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Squared distance to the drift that the adjoint requests, summed over steps."""
        scale = expand_to(rollout[keys.SCALE], rollout[keys.LOC])
        drift = (rollout[keys.LOC] - rollout[keys.PRIOR_LOC]) / scale
        asked = scale * rollout[_ADJOINT]
        episodes = len(rollout)
        return TensorDict(
            {
                "loss_adjoint": (drift - asked).square().sum() / (2 * episodes),
                "adjoint_norm": asked.flatten(2).square().sum(2).mean().sqrt(),
            },
            batch_size=[],
        )
