"""A small network for images beside the frozen prior, which reads what the prior would draw."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError, check_sizes
from ctrl_rl.gaussian import expand_to
from ctrl_rl.image_nets import ModulatedImageNetwork
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies.policy import DenoisingPolicy
from ctrl_rl.priors import Prior


class SideImagePolicy(DenoisingPolicy):
    """loc = prior_loc + scale_k u(x, clean estimate, k, y), so that a step's KL is |u|^2 / 2.

    `SideNetworkPolicy` for latents that are images [C, H, W], of any size. The clean estimate is
    the prior's, taken from its mean, and costs no call: the same knowledge as the drift that
    `SideNetworkPolicy` reads, but a picture with the same scale at every step, so that one network
    reads all steps alike.

    Args:
        prior: the pretrained model, for the latent's shape.
        kernel: the transition kernel.
        controls: number of labels of each named control.
        width: hidden width of the perceptron that sees the whole image.
        depth: its residual blocks.
        channels: of the convolutions.
        blocks: residual blocks of convolutions; 0 for the perceptron alone.

    Raises:
        ConfigError: a size below 1, or latents that are no images.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        controls: Mapping[str, int],
        width: int = 384,
        depth: int = 3,
        channels: int = 32,
        blocks: int = 0,
    ) -> None:
        super().__init__(kernel)
        check_sizes("policy", width=width, depth=depth, channels=channels, blocks=blocks + 1)
        if len(prior.shape) != 3:
            raise ConfigError(
                f"policy=side_image is for latents [C, H, W], and this prior's have shape "
                f"{list(prior.shape)}; use policy=side_network"
            )
        incoming, *sides = prior.shape
        self.drift = ModulatedImageNetwork(
            shape=(2 * incoming, *sides),
            outputs=incoming,
            num_steps=kernel.num_steps,
            controls=controls,
            width=width,
            depth=depth,
            channels=channels,
            blocks=blocks,
        )

    def loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the prior's mean by u standard deviations."""
        seen = torch.cat([x, self.kernel.denoised(x, prior_loc, step)], dim=1)
        scale = expand_to(self.kernel.scale[step], x)
        return prior_loc + scale * self.drift(seen, step, control)
