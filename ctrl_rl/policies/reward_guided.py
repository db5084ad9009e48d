"""A learned multiple of the reward's gradient, added to the mean of any policy."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctrl_rl.errors import ConfigError, NonFiniteError
from ctrl_rl.gaussian import expand_to
from ctrl_rl.policies.policy import DenoisingPolicy

Value = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class RewardGuidedPolicy(DenoisingPolicy):
    r"""loc = policy's loc + scale_k a_k grad_d r(d, y) at d, the prior's clean estimate.

    The reward's gradient gives the direction, so only how far to go is left to learn: one number
    a_k per step, 0 at the start. Early on the clean estimate is a blur and the gradient a hint.
    Towards the end the estimate is the sample; the gradient is right, and vanishes where the sample
    already shows what was asked. In those last steps few episodes are still undecided, so a network
    that learns from episodes' rewards has little to learn from.

    The drift is the policy's plus this one, as in the path integral sampler (Zhang, Chen, ICLR
    2022, arXiv 2111.15141), which adds a learned multiple of the gradient of the target's
    log-density. Guidance by a clean estimate without the network's Jacobian is that of He et al.,
    "Manifold Preserving Guided Diffusion", ICLR 2024, arXiv 2311.16424, with weights chosen by
    hand.

    The cost: every step of an episode, in training and in sampling, runs decoder and reward forward
    and backward. `reward_calls` counts them, `denoiser_calls` does not. Agents that differentiate
    through the chain differentiate the gradient too; `trainer.microbatch` and checkpointing do not
    bound the memory for that, which is small for small classifiers only. Agents with several epochs
    or minibatches compute the gradient anew in each.

    If the reward does not depend on the sample, as with all labels null, nothing is added.

    Args:
        policy: any other policy.
        value: the reward in nats [B] of clean latents [B, *S] under labels; None if it has no
            gradient.

    Raises:
        ConfigError: the reward has no gradient, or the policy is guided already.
    """

    _GROUP = "guidance"  # of the learning rate

    def __init__(self, *, policy: DenoisingPolicy, value: Value | None) -> None:
        super().__init__(policy.kernel)
        if value is None:
            raise ConfigError(
                "guidance=reward follows the reward's gradient, and this reward is not "
                "differentiable; use guidance=null, or a differentiable reward"
            )
        if self._GROUP in policy.parameter_groups():
            raise ConfigError(f"the policy has parameters named {self._GROUP} already")
        self.policy, self._value = policy, value
        none = torch.zeros(policy.kernel.num_steps, 1, device=policy.kernel.scale.device)
        self.weights = nn.Embedding.from_pretrained(none, freeze=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewardGuidedPolicy":
        """Copy the policy and the weights; the reward, and with it the prior, stays the same."""
        copy = RewardGuidedPolicy(policy=deepcopy(self.policy, memo), value=self._value)
        copy.weights = deepcopy(self.weights, memo)
        copy.calls = self.calls
        memo[id(self)] = copy
        return copy

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the policy's mean along the reward's gradient.

        Raises:
            NonFiniteError: the reward's gradient is not finite.
        """
        loc = self.policy.loc(x, step, control, prior_loc)
        gradient = self._gradient(self.kernel.denoised(x, prior_loc, step), control)
        weight = self.kernel.scale[step] * self.weights(step)[:, 0]
        return loc + expand_to(weight, x) * gradient

    def _gradient(self, clean: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The reward's gradient [B, *S] at clean latents, a function of them under autograd."""
        keep = torch.is_grad_enabled() and clean.requires_grad
        # Fused attention has no second derivative.
        attention = sdpa_kernel(SDPBackend.MATH) if keep else nullcontext()
        with torch.enable_grad(), attention:
            if not keep:
                clean = clean.detach().requires_grad_()
            total = self._value(clean, control).sum()
            if not total.requires_grad:
                return torch.zeros_like(clean)
            (gradient,) = torch.autograd.grad(
                total, clean, create_graph=keep, allow_unused=True, materialize_grads=True
            )
        if not torch.isfinite(gradient).all():
            raise NonFiniteError(
                "guidance=reward: the reward's gradient at the prior's clean estimate is not "
                "finite; use guidance=null"
            )
        return gradient

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The policy's groups, and the weights, which have their own rate."""
        return {**self.policy.parameter_groups(), self._GROUP: list(self.weights.parameters())}

    def compile_network(self, backend: str) -> bool:
        """Compile the policy's large network."""
        return self.policy.compile_network(backend)
