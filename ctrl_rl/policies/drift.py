"""A correction to the prior's drift, for low-dimensional priors with a closed-form denoiser."""

from collections.abc import Mapping

from torch import Tensor, nn

from ctrl_rl.controls import Control
from ctrl_rl.errors import ConfigError, check_sizes
from ctrl_rl.gaussian import expand_to
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.networks.perceptrons import ConditionedPerceptron
from ctrl_rl.policies.policy import DenoisingPolicy
from ctrl_rl.priors import Prior


class DriftPolicy(DenoisingPolicy):
    """loc = prior_loc + scale_k u(x, k, y), so the step's KL is exactly |u|^2 / 2.

    The prior's mean is read from the state: the policy adds no call of the prior.

    Args:
        prior: the pretrained model, for the latent's shape.
        kernel: the transition kernel.
        controls: the task's controls by name.
        width: hidden width of the perceptron u.
        depth: its hidden layers.

    Raises:
        ConfigError: the latent is not a vector.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        controls: Mapping[str, Control],
        width: int = 128,
        depth: int = 2,
    ) -> None:
        super().__init__(kernel)
        check_sizes("policy", width=width, depth=depth)
        if len(prior.shape) != 1:
            raise ConfigError(
                f"policy=drift needs vector latents, this prior has shape {prior.shape}; "
                "use policy=side_network or fine_tuned"
            )
        self.drift = ConditionedPerceptron(
            inputs=prior.shape[0],
            outputs=prior.shape[0],
            num_steps=kernel.num_steps,
            controls=controls,
            width=width,
            depth=depth,
        )

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the prior's mean by u standard deviations."""
        drift = self.drift(x, step, control)
        return prior_loc + expand_to(self.kernel.scale[step], x) * drift

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The embedding starts at 0 and learns at its own rate."""
        embedding = list(self.drift.embedding.parameters())
        chosen = {id(parameter) for parameter in embedding}
        return {
            "network": [p for p in self.drift.parameters() if id(p) not in chosen],
            "embedding": embedding,
        }
