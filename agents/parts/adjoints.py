r"""Gradients in the latents of a rollout, all constants, one step in memory at a time.

The lean adjoint (Domingo-Enrich, Drozdzal, Karrer, Chen, "Adjoint Matching", ICLR 2025, arXiv
2409.08861) is, for a trajectory x_0 .. x_K and in discrete time,

    a_K = d reward(read_out(x_K), y) / d x_K,        a_k = (d prior_loc(x_k, k) / d x_k)^T a_{k+1}.

It equals the gradient of the soft value where it is the same along every trajectory, as for an
affine prior with a linear reward, and in expectation at the optimum in continuous time.

The other two are terms of detailed balance between soft values v and a policy,
v_k(s) + log_ratio(s, a) = v_{k+1}(a), differentiated in a and in s.
"""

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.agent import Chain


def lean_adjoint(chain: Chain, episodes: TensorDict) -> Tensor:
    """Lean adjoint of every action.

    Args:
        chain: where they came from; prior and reward are called.
        episodes: [B, K] of a rollout.

    Returns:
        [B, K, *S], at step k the adjoint a_{k+1} of the latent that the action led to, in nats per
        unit of the latent.
    """
    control = dict(episodes[keys.CONTROL][:, -1].items())
    num_steps = episodes.batch_size[1]
    adjoint, adjoints = torch.empty(0), []
    for k in range(num_steps, 0, -1):  # the latent x_k is the action of step k - 1
        with torch.enable_grad():
            x = episodes[keys.ACTION][:, k - 1].detach().requires_grad_(True)
            loc = chain.prior_loc(x, torch.full((len(x),), k, device=x.device), control)
            if k == num_steps:
                target = chain.reward(chain.decode(loc), control).sum()
            else:
                target = (loc * adjoint).sum()
            (adjoint,) = torch.autograd.grad(target, x)
        adjoints.append(adjoint)
    return torch.stack(adjoints[::-1], dim=1)


def reward_gradient(chain: Chain, episodes: TensorDict) -> Tensor:
    """Gradient of the reward of the prior's one-step estimate, a first guess of grad v.

    Args:
        chain: where they came from; prior and reward are called.
        episodes: [B, K] of a rollout.

    Returns:
        [B, K, *S], at step k the gradient in the latent x_{k+1} that the action led to, of
        r(clean_estimate(x_{k+1}, k+1), y), in nats per unit; exact at the last step.
    """
    control = dict(episodes[keys.CONTROL][:, -1].items())
    gradients = []
    for k, action in enumerate(episodes[keys.ACTION].unbind(1)):
        with torch.enable_grad():
            x = action.detach().requires_grad_(True)
            step = torch.full((len(x),), k + 1, device=x.device)
            estimate = chain.clean_estimate(x, step, control)
            reward = chain.reward(chain.decode(estimate), control)
            gradients.append(torch.autograd.grad(reward.sum(), x)[0])
    return torch.stack(gradients, dim=1)


def log_ratio_gradient(chain: Chain, episodes: TensorDict) -> Tensor:
    """Gradient of log pi(a|s) - log p_ref(a|s) in the latent of s, the action held fixed.

    Args:
        chain: where they came from; prior and policy are called.
        episodes: [B, K] of a rollout.

    Returns:
        [B, K, *S], at step k the gradient in x_k, in nats per unit.
    """
    gradients = []
    for state in episodes.detach().unbind(1):
        step, control = state[keys.STEP], dict(state[keys.CONTROL].items())
        with torch.enable_grad():
            x = state[keys.X].clone().requires_grad_(True)
            prior_loc = chain.prior_loc(x, step, control)
            loc = chain.policy_loc(x, step, control, prior_loc)
            ratio = gaussian.log_ratio(state[keys.ACTION], loc, prior_loc, state[keys.SCALE])
            gradients.append(torch.autograd.grad(ratio.sum(), x)[0])
    return torch.stack(gradients, dim=1)
