"""A policy of the denoising MDP: pi(a | s) = N(loc(s), scale_k^2 I) with the prior's scale.

A policy is a TensorDict module: it reads `x`, `step`, `control`, `prior_loc` of a state and writes
`loc`, `scale`, `action`, `action_log_prob`. So a stock `env.rollout(K, policy)` works too. Actions
are always drawn: a denoising policy without its noise is another model, so TorchRL's exploration
type (deterministic outside a collector) does not apply. For the mean, read `loc`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from ctrl_rl import gaussian, keys
from ctrl_rl.kernels import TransitionKernel


class DenoisingPolicy(TensorDictModuleBase, ABC):  # type: ignore[misc]
    """Base of all policies; a subclass gives the mean of the next latent.

    Args:
        kernel: gives the scale of every step.
    """

    def __init__(self, kernel: TransitionKernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.calls = 0  # evaluations of the policy, counted in samples
        self.in_keys = [keys.X, keys.STEP, keys.CONTROL, keys.PRIOR_LOC]
        self.out_keys = [keys.LOC, keys.SCALE, keys.ACTION, keys.ACTION_LOG_PROB]

    @abstractmethod
    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Mean of the next latent; callers use `loc`, which counts calls.

        Args:
            x: [B, *S] latent.
            step: [B] int64, 0 .. K-1.
            control: values by name, each [B], int64 for labels and float32 for numbers.
            prior_loc: [B, *S] the prior's mean at the same state, already computed.

        Returns:
            [B, *S] float32.
        """

    def loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Mean of the next latent, counted in `calls`; shapes as in `mean`."""
        self.calls += len(x)
        return self.mean(x, step, control, prior_loc)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by name of their learning rate."""
        return {"network": [p for p in self.parameters() if p.requires_grad]}

    def compile_network(self, backend: str) -> bool:
        """Compile the policy's large network; returns whether it has one besides the prior's."""
        del backend
        return False

    def forward(
        self, state: TensorDictBase, generator: torch.Generator | None = None
    ) -> TensorDictBase:
        """Draw an action for every state and write it, its law and its log-probability."""
        step = state[keys.STEP]
        control = dict(state[keys.CONTROL].items())
        loc = self.loc(state[keys.X], step, control, state[keys.PRIOR_LOC])
        scale = self.kernel.scale[step]
        action = gaussian.draw(loc, scale, generator)
        state.set(keys.LOC, loc)
        state.set(keys.SCALE, scale)
        state.set(keys.ACTION, action)
        state.set(keys.ACTION_LOG_PROB, gaussian.log_prob(action, loc, scale))
        return state


class PriorPolicy(DenoisingPolicy):
    """The pretrained model itself as a policy: loc is the prior's."""

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Return the prior's mean."""
        del x, step, control
        return prior_loc


class StrengthPolicy(DenoisingPolicy):
    """A trained policy with its drift scaled after training: prior + w (policy - prior).

    w = 0 is the prior, w = 1 the policy as trained; in between and beyond, the control's strength
    is tuned without training, as classifier-free guidance does with its scale.

    Args:
        policy: the trained policy.
        strength: w >= 0.
    """

    def __init__(self, policy: DenoisingPolicy, strength: float) -> None:
        super().__init__(policy.kernel)
        self.policy = policy
        self.strength = strength

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Mix the two means."""
        loc = self.policy.loc(x, step, control, prior_loc)
        return prior_loc + self.strength * (loc - prior_loc)
