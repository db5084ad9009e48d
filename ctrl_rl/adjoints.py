r"""Gradients of the reward carried back along the prior's chain, one step in memory at a time.

The lean adjoint (Domingo-Enrich, Drozdzal, Karrer, Chen, "Adjoint Matching", ICLR 2025, arXiv
2409.08861, eqs. 38 and 39) is, for a trajectory x_0 .. x_K and in discrete time,

    a_K = d reward(read_out(x_K), y) / d x_K,        a_k = (d prior_loc(x_k, k) / d x_k)^T a_{k+1}.

It equals the gradient of the soft value where that is the same along every trajectory, as for an
affine prior with a linear reward, and in expectation at the optimum in continuous time.
"""

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.envs.process import DenoisingProcess


def lean_adjoint(process: DenoisingProcess, episodes: TensorDict) -> Tensor:
    """Lean adjoint of every action.

    Args:
        process: the MDP; its calls of prior and reward are counted.
        episodes: [B, K] of a rollout.

    Returns:
        [B, K, *S], at step k the adjoint a_{k+1} of the latent that the action led to, in nats per
        unit of the latent.
    """
    control = dict(episodes[keys.CONTROL][:, -1].items())
    num_steps = episodes.batch_size[1]
    adjoint, found = torch.empty(0), []
    for k in range(num_steps, 0, -1):  # the latent x_k is the action of step k - 1
        with torch.enable_grad():
            x = episodes[keys.ACTION][:, k - 1].detach().requires_grad_(True)
            loc = process.prior_loc(x, torch.full((len(x),), k, device=x.device))
            if k == num_steps:
                target = process.reward(process.prior.decode(loc), control).sum()
            else:
                target = (loc * adjoint).sum()
            (adjoint,) = torch.autograd.grad(target, x)
        found.append(adjoint)
    return torch.stack(found[::-1], dim=1)
