"""Full fine-tuning with a network beside it, for priors too small to do two jobs."""

from collections.abc import Mapping

from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.nets import StepwiseDrift
from ctrl_rl.policies.fine_tuned import FineTunedPolicy
from ctrl_rl.priors import Prior


class FineTunedDriftPolicy(FineTunedPolicy):
    """loc = the fine-tuned network's mean + scale_k u(x, k, y), with u a network of its own.

    u has a table of steps and sees them as they are, where the prior's network sees a timestep; it
    works in standard deviations of the step, in which the KL is measured. It starts at 0.

    Args:
        prior: the pretrained model; its denoiser must accept an embedding.
        kernel: the transition kernel.
        controls: number of labels of each named control.
        channels: of u's convolutions, a multiple of 4.
        width: of u's embeddings of steps and labels.
        depth: u's residual blocks.

    Raises:
        ConfigError: a size out of range, latents that are no images of even sides, or a denoiser
            that has no input for an embedding.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        controls: Mapping[str, int],
        channels: int = 32,
        width: int = 64,
        depth: int = 3,
    ) -> None:
        super().__init__(prior=prior, kernel=kernel, controls=controls)
        for name, size in {"width": width, "depth": depth}.items():
            if size < 1:
                raise ConfigError(f"policy.{name}={size} must be 1 or more")
        if channels < 4 or channels % 4:
            raise ConfigError(f"policy.channels={channels} must be a multiple of 4")
        if len(prior.shape) != 3 or any(side % 2 for side in prior.shape[1:]):
            raise ConfigError(
                f"policy=fine_tuned_drift needs images of even sides, this prior has shape "
                f"{tuple(prior.shape)}; use policy=fine_tuned"
            )
        self.drift = StepwiseDrift(
            shape=tuple(prior.shape),
            num_steps=kernel.num_steps,
            controls=controls,
            channels=channels,
            width=width,
            depth=depth,
        )

    def loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Mean of the kernel's step from the fine-tuned clean estimate, shifted by u."""
        shift = expand_to(self.kernel.scale[step], x) * self.drift(x, step, control)
        return super().loc(x, step, control, prior_loc) + shift

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Add u at the network's rate, its embeddings too: they do not start at 0."""
        groups = super().parameter_groups()
        return groups | {"network": [*groups["network"], *self.drift.parameters()]}
