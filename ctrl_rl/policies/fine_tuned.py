"""Full fine-tuning: a trainable copy of the prior's denoiser plus a control embedding."""

from collections.abc import Mapping
from copy import deepcopy

from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.nets import ControlEmbedding
from ctrl_rl.policies.policy import DenoisingPolicy
from ctrl_rl.priors import Prior


class FineTunedPolicy(DenoisingPolicy):
    """Every weight of the prior's network is trained, and a zero-initialised embedding of y.

    At initialisation the copy's output equals the prior's bit for bit. Meant for networks that fit
    twice in memory; large ones train adapters on the one network instead.

    Args:
        prior: the pretrained model; its denoiser must accept an embedding.
        kernel: the transition kernel.
        controls: number of labels of each named control.

    Raises:
        ConfigError: the prior's denoiser has no input for an embedding.
    """

    def __init__(
        self, *, prior: Prior, kernel: TransitionKernel, controls: Mapping[str, int]
    ) -> None:
        super().__init__(kernel)
        features = prior.denoiser.embedding_features
        if features == 0:
            raise ConfigError(
                f"policy=fine_tuned needs a prior that takes a control embedding, "
                f"{type(prior.denoiser).__name__} takes none; use policy=side_network or drift"
            )
        # The frozen prior stays in evaluation mode and so does its copy, or dropout would make
        # the two differ at initialisation.
        self.denoiser = deepcopy(prior.denoiser).requires_grad_(True).eval()
        self.embedding = ControlEmbedding(controls, features)

    def train(self, mode: bool = True) -> "FineTunedPolicy":
        """Stay in evaluation mode, as the prior does."""
        return super().train(False)

    def loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Mean of the kernel's step from the fine-tuned clean estimate."""
        del prior_loc
        embedding, prompt = self.embedding(control), control.get(keys.PROMPT)
        denoised = self.denoiser(x, self.kernel.timesteps[step], embedding, prompt)
        return self.kernel.mean(x, denoised, step)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The embedding starts at 0 and learns with a rate of its own."""
        return {
            "network": list(self.denoiser.parameters()),
            "embedding": list(self.embedding.parameters()),
        }

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the denoiser's activations in the backward pass."""
        self.denoiser.checkpointing = enabled
