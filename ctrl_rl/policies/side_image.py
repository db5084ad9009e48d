"""Small networks for images beside the frozen prior, one per control, whose drifts add up."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl_rl.controls import Control
from ctrl_rl.errors import ConfigError, check_sizes
from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.networks.convolutional import ModulatedImageNetwork
from ctrl_rl.networks.execution import FixedPrecision, in_parts
from ctrl_rl.policies.policy import DenoisingPolicy
from ctrl_rl.priors import Prior


class SideImagePolicy(DenoisingPolicy):
    r"""loc = prior_loc + scale_k sum_c u_c(x, clean estimate, k, y_c), so a step's KL is |sum|^2/2.

    `SideNetworkPolicy` for latents that are images [C, H, W], of any size. It differs in two ways:

    - It has one network per control, and their drifts add up. If labels are independent given the
      latent, so do the log-probabilities that they approximate: log h(x, y_1, y_2) = log h(x, y_1)
      + log h(x, y_2). A control at its null label adds exactly nothing. So each control works
      alone, even if no training episode asked for it alone, and an episode that asks for nothing is
      the prior's.
    - It reads the prior's clean estimate instead of its drift: the same knowledge, taken from the
      prior's mean without another call, but as a picture. Early estimates hardly differ from each
      other, and their few differences say what is to come. So their mean and spread are taken out
      step by step; they come from 64 episodes of the prior, drawn when the policy is built.

    Args:
        prior: the pretrained model.
        kernel: the transition kernel.
        controls: the task's controls by name; without any there is one network.
        width: hidden width of the perceptron that sees the whole image.
        depth: its residual blocks.
        channels: of the convolutions.
        blocks: residual blocks of convolutions; 0 for the perceptron alone.

    Raises:
        ConfigError: a size below 1, or latents that are no images.
    """

    # Adam moves every weight of a last layer by the learning rate, all to the same effect, so its
    # first few updates would overshoot: the gap rose from 4.8 to 12 nats on faces without it.
    _GAIN = 0.1

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        controls: Mapping[str, Control],
        width: int = 256,
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
        self.controls = dict(controls)
        self.standard = _Standard(prior, kernel)
        self.drifts = nn.ModuleDict(
            {
                f"of_{name}": ModulatedImageNetwork(
                    shape=(2 * incoming, *sides),
                    outputs=incoming,
                    num_steps=kernel.num_steps,
                    controls=own,
                    width=width,
                    depth=depth,
                    channels=channels,
                    blocks=blocks,
                )
                for name, own in self._parts().items()
            }
        )

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the prior's mean by the sum of the drifts, in standard deviations."""
        estimate = self.standard(self.kernel.denoised(x, prior_loc, step), step)
        seen = torch.cat([x, estimate], dim=1)
        total = torch.zeros_like(x)
        for name, own in self._parts().items():
            drift = self.drifts[f"of_{name}"](seen, step, control)
            for control_name, asked in own.items():
                drift = drift * expand_to(~asked.is_null(control[control_name]), x)
            total = total + drift
        return prior_loc + self._GAIN * expand_to(self.kernel.scale[step], x) * total

    def _parts(self) -> dict[str, dict[str, Control]]:
        """The controls of each network: one, or none if the task has none."""
        return {name: {name: control} for name, control in self.controls.items()} or {"all": {}}


class _Standard(FixedPrecision):
    """Standardises clean estimates by the prior's mean [K, *S] and spread [K] at every step."""

    mean: Tensor
    spread: Tensor
    _EPISODES, _ROWS = 64, 16  # the mean is then known to an eighth of the spread; rows at once

    @torch.no_grad()
    def __init__(self, prior: Prior, kernel: TransitionKernel) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        device = kernel.scale.device

        def noise() -> Tensor:
            return torch.randn(self._EPISODES, *prior.shape, generator=generator).to(device)

        x, means, spreads = noise(), [], []
        for k in range(kernel.num_steps):
            step = torch.full((self._EPISODES,), k, device=device)
            estimate = in_parts(
                prior.denoiser, x, kernel.timesteps[step], rows=self._ROWS, recompute=False
            )
            loc = kernel.mean(x, estimate, step)
            estimate = kernel.denoised(x, loc, step)
            means.append(estimate.mean(0))
            spreads.append(estimate.var(0).mean().sqrt())
            x = loc + kernel.scale[k] * noise()
        self.register_buffer("mean", torch.stack(means))
        self.register_buffer("spread", torch.stack(spreads).clamp(min=torch.finfo(x.dtype).eps))

    def forward(self, estimate: Tensor, step: Tensor) -> Tensor:
        """Standardise estimates [B, *S] at steps [B]."""
        return (estimate - self.mean[step]) / expand_to(self.spread[step], estimate)
