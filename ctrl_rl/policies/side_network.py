"""A small network beside the frozen prior, which reads where the prior is about to go."""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ctrl_rl.controls import Control
from ctrl_rl.errors import check_sizes
from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.networks.perceptrons import ModulatedPerceptron
from ctrl_rl.policies.policy import DenoisingPolicy
from ctrl_rl.priors import Prior


class SideNetworkPolicy(DenoisingPolicy):
    """loc = prior_loc + scale_k u(x, prior_loc, k, y), so a step's KL is exactly |u|^2 / 2.

    An additive side network (Zhang et al., "Side-Tuning", ECCV 2020, arXiv 1912.13503) that sees
    the latent and the prior's drift, in standard deviations of the step. The drift holds what the
    pretrained network knows of the latent, which need not be learned again, as in DEFT (Denker et
    al., NeurIPS 2024, arXiv 2406.01781). The policy adds no call of the prior, and costs far less
    than one if the prior's network is large.

    A perceptron on flattened latents: meant for latents of up to a few thousand numbers.

    Args:
        prior: the pretrained model, for the latent's shape.
        kernel: the transition kernel.
        controls: the task's controls by name.
        width: hidden width of the perceptron u.
        depth: its residual blocks.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        controls: Mapping[str, Control],
        width: int = 384,
        depth: int = 3,
    ) -> None:
        super().__init__(kernel)
        check_sizes("policy", width=width, depth=depth)
        size = prod(prior.shape)
        self.drift = ModulatedPerceptron(
            inputs=2 * size,
            outputs=size,
            num_steps=kernel.num_steps,
            controls=controls,
            width=width,
            depth=depth,
        )

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the prior's mean by u standard deviations."""
        scale = expand_to(self.kernel.scale[step], x)
        seen = torch.cat([x.flatten(1), ((prior_loc - x) / scale).flatten(1)], dim=1)
        return prior_loc + scale * self.drift(seen, step, control).reshape(x.shape)
