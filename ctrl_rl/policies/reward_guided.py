"""A learned multiple of the reward's gradient, added to the mean of any policy."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.gaussian import expand_to
from ctrl_rl.policies.policy import DenoisingPolicy

Value = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def unguided(*, policy: DenoisingPolicy, value: Value | None) -> DenoisingPolicy:
    """The policy as it is."""
    del value
    return policy


class RewardGuidedPolicy(DenoisingPolicy):
    r"""loc = policy's loc + scale_k a_k grad_d r(d, y) at d, the prior's clean estimate.

    The reward itself says which way its own gradient points, so that only how far to go is left to
    learn: one number a_k per step, 0 at the start. Early on the clean estimate is a blur and the
    gradient a hint; towards the end it is the sample and the gradient is right, and vanishes where
    the sample already shows what was asked. There a network that knows rewards from episodes alone
    is at its weakest, since few of them are still undecided.

    The drift is the policy's plus this one, as in the path integral sampler (Zhang, Chen, ICLR
    2022, arXiv 2111.15141, eq. 16, who add the gradient of the target's log-density); guidance by a
    clean estimate without the network's Jacobian is that of He et al., "Manifold Preserving Guided
    Diffusion", ICLR 2024, arXiv 2311.16424. Their weights are chosen, these are trained.

    Every step of an episode then costs a reward and its gradient, counted as calls of the reward,
    and so does every sample that is drawn after training. A control at its null label adds exactly
    nothing.

    Args:
        policy: any other.
        value: the reward in nats [B] of clean latents [B, *S] under labels; None where it has no
            gradient.

    Raises:
        ConfigError: the reward has no gradient.
    """

    def __init__(self, *, policy: DenoisingPolicy, value: Value | None) -> None:
        super().__init__(policy.kernel)
        if value is None:
            raise ConfigError(
                "guidance=reward follows the reward's gradient, and this reward is not "
                "differentiable; use guidance=none, or a differentiable reward"
            )
        self.policy, self._value = policy, value
        self.weights = nn.Embedding(policy.kernel.num_steps, 1, device=policy.kernel.scale.device)
        nn.init.zeros_(self.weights.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewardGuidedPolicy":
        """Copy the policy and the weights; the reward, and with it the prior, stays the same."""
        copy = RewardGuidedPolicy(policy=deepcopy(self.policy, memo), value=self._value)
        copy.weights.load_state_dict(self.weights.state_dict())
        copy.calls = self.calls
        memo[id(self)] = copy
        return copy

    def loc(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the policy's mean along the reward's gradient."""
        loc = self.policy.loc(x, step, control, prior_loc)
        gradient = self._gradient(self.kernel.denoised(x, prior_loc, step), control)
        weight = self.kernel.scale[step] * self.weights(step)[:, 0]
        return loc + expand_to(weight, x) * gradient

    def _gradient(self, clean: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The reward's gradient [B, *S] at clean latents, a function of them under autograd."""
        keep = torch.is_grad_enabled() and clean.requires_grad
        with torch.enable_grad():
            if not keep:
                clean = clean.detach().requires_grad_()
            total = self._value(clean, control).sum()
            (gradient,) = torch.autograd.grad(total, clean, create_graph=keep)
        return gradient

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Those of the policy, and the weights, which have a rate of their own."""
        return {**self.policy.parameter_groups(), "guidance": list(self.weights.parameters())}

    def set_microbatch(self, rows: int | None) -> None:
        """Give the policy's large network so many samples at once at most."""
        self.policy.set_microbatch(rows)

    def compile_network(self, backend: str) -> bool:
        """Compile the policy's large network."""
        return self.policy.compile_network(backend)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the policy's activations in the backward pass."""
        self.policy.set_checkpointing(enabled)
