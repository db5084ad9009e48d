"""Full fine-tuning: a trainable copy of the prior's denoiser plus a control embedding."""

from collections.abc import Mapping
from copy import deepcopy

from ctrl_rl.controls import Control
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies.embedded import EmbeddedPolicy
from ctrl_rl.priors import Denoiser, Prior


class FineTunedPolicy(EmbeddedPolicy):
    """Trains every weight of the prior's network, and a zero-initialised embedding of y.

    At initialisation the copy's output equals the prior's bit for bit. Meant for networks that fit
    twice in memory; for large ones, train adapters on the one network instead.

    Args:
        prior: the pretrained model; its denoiser must accept an embedding.
        kernel: the transition kernel.
        controls: the task's controls by name.

    Raises:
        ConfigError: the prior's denoiser has no input for an embedding.
    """

    def __init__(
        self, *, prior: Prior, kernel: TransitionKernel, controls: Mapping[str, Control]
    ) -> None:
        super().__init__(prior=prior, kernel=kernel, controls=controls, make_denoiser=_trainable)


def _trainable(denoiser: Denoiser) -> Denoiser:
    return deepcopy(denoiser).requires_grad_(True).eval()
