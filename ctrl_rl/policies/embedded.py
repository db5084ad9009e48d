"""Base of policies with the prior's kind of network: a denoiser and an embedding of y."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.controls import Control
from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.networks.embeddings import ControlEmbedding
from ctrl_rl.policies.policy import DenoisingPolicy
from ctrl_rl.priors import Denoiser, Prior


class EmbeddedPolicy(DenoisingPolicy):
    """loc is the kernel's step from a denoiser that takes a zero-initialised embedding of y.

    Args:
        prior: the pretrained model; its denoiser must accept an embedding.
        kernel: the transition kernel.
        controls: the task's controls by name.
        make_denoiser: makes the trained denoiser from the prior's.

    Raises:
        ConfigError: the prior's denoiser has no input for an embedding.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        controls: Mapping[str, Control],
        make_denoiser: Callable[[Denoiser], Denoiser],
    ) -> None:
        super().__init__(kernel)
        features = prior.denoiser.embedding_features
        if features == 0:
            raise ConfigError(
                f"{type(self).__name__} needs a prior that takes a control embedding, "
                f"{type(prior.denoiser).__name__} takes none; use policy=side_network or drift"
            )
        self.denoiser = make_denoiser(prior.denoiser)
        self.embedding = ControlEmbedding(controls, features)

    def train(self, mode: bool = True) -> "EmbeddedPolicy":
        """Stay in evaluation mode, as the prior does: dropout would make the two differ."""
        return super().train(False)

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Mean of the kernel's step from the trained clean estimate."""
        del prior_loc
        # Without controls it is one row for all.
        embedding = self.embedding(control).expand(len(x), -1)
        prompt = control.get(keys.PROMPT)
        denoised = self.denoiser(x, self.kernel.timesteps[step], embedding, prompt)
        return self.kernel.mean(x, denoised, step)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The embedding starts at 0 and learns at its own rate."""
        return {
            "network": list(self.denoiser.parameters()),
            "embedding": list(self.embedding.parameters()),
        }

    def compile_network(self, backend: str) -> bool:
        """Compile the denoiser's network; adapters are compiled with the prior's."""
        return self.denoiser.compile_network(backend)
