r"""Reconstruction guidance: the prior's step, shifted along the gradient of the estimated reward.

    loc_k = prior_loc_k + strength scale_k^2 grad_x r( x_hat(x_k, k), y ),

where x_hat is the prior's estimate of the clean sample, decoded; the gradient goes through the
prior's network. To first order the soft optimum shifts by scale_k^2 grad v_{k+1}, with v_k(x) =
log E[e^r | x_k = x]. So r(x_hat) stands for the soft value: low by what r's curvature and the
spread of clean samples add, and one step early. If the prior is Gaussian and r linear it has the
gradient of v_k, and the gap is the sum of scale_k^2 |grad v_k - grad v_{k+1}|^2 / 2, plus what the
fixed start costs every policy.

It is a Gaussian policy with the prior's scale, so its path KL has a closed form and its gap is
measured like any policy's. It costs one more call of the prior and one backward pass per step.

References: Ho, Salimans, Gritsenko, Chan, Norouzi, Fleet, "Video Diffusion Models", NeurIPS 2022,
arXiv 2204.03458 (reconstruction-guided sampling); Chung, Kim, Mccann, Klasky, Ye, "Diffusion
Posterior Sampling for General Noisy Inverse Problems", ICLR 2023, arXiv 2209.14687; for any reward:
Bansal et al., "Universal Guidance for Diffusion Models", 2023, arXiv 2302.07121.

Deviations: the weight is the step's variance, as theory asks for, times a strength; it is not
divided by the norm of the error, and no step is repeated.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError, NonFiniteError
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.gaussian import expand_to
from ctrl_rl.policies import DenoisingPolicy


class ReconstructionGuidance(DenoisingPolicy):
    """A policy without parameters that follows the reward of the estimated clean sample.

    Args:
        process: gives prior, decoder and reward; their calls are counted.
        strength: > 0; 1 is what theory asks for, 0 would be the prior.

    Raises:
        ConfigError: the reward is not differentiable, or the strength is not > 0.
    """

    def __init__(self, process: DenoisingProcess, strength: float = 1.0) -> None:
        super().__init__(process.kernel)
        if not process.reward_model.differentiable:
            raise ConfigError(
                "method=reconstruction_guidance follows the reward's gradient, and "
                f"{type(process.reward_model).__name__} is not differentiable; use "
                "method=rejection, or a differentiable reward"
            )
        if not 0 < strength < math.inf:
            raise ConfigError(f"method.strength={strength} must be > 0; use method=prior for 0")
        self.strength = strength
        self._process = [process]  # in a list: it is no part of this module

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the prior's mean.

        Raises:
            NonFiniteError: the reward's gradient is not finite.
        """
        (process,) = self._process
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = process.value_of_clean(process.clean_estimate(x, step, control), control)
            if value.requires_grad:  # with all labels null a reward may have no graph
                (gradient,) = torch.autograd.grad(value.sum(), x)
            else:
                gradient = torch.zeros_like(x)
        if not torch.isfinite(gradient).all():
            raise NonFiniteError(
                "method=reconstruction_guidance: the reward's gradient through the prior is not "
                "finite; use method=rejection"
            )
        weight = self.strength * self.kernel.scale[step].square()
        return prior_loc + expand_to(weight, x) * gradient


def reconstruction_guidance(*, process: DenoisingProcess, strength: float = 1.0) -> PolicySampler:
    """`ReconstructionGuidance` as a sampler."""
    return PolicySampler(process, ReconstructionGuidance(process, strength))
