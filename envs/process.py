"""The denoising MDP itself, shared by the TorchRL env and the Gymnasium envs.

K stochastic steps. State s_k = (x_k, k, y); action a_k = x_{k+1}; the transition is deterministic.
Start x_0 ~ N(0, I). After the last action the read-out (the scheduler's noise-free last step, done
by the frozen prior) and the decoder turn x_K into a clean sample, which is rewarded with

    r(sample, y) = guidance_strength * reward(sample, y)    [nats]

The other half of the objective, -KL(pi || p_ref) per step, is a function of policy and prior and is
formed where both are known.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ctrl_rl.envs.control_laws import BalancedLaw, ControlLaw
from ctrl_rl.errors import ConfigError, did_you_mean
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.priors import Prior
from ctrl_rl.rewards import Reward


class DenoisingProcess(nn.Module):
    """Prior x kernel x reward: everything of the MDP but the agent.

    Args:
        prior: frozen pretrained model.
        kernel: Gaussian transitions.
        reward: reward of clean samples, in nats.
        guidance_strength: gamma > 0; the target is p(sample) p(y | sample)^gamma.
        control_law: law of the labels of every control; None is `BalancedLaw`.

    Raises:
        ConfigError: guidance_strength <= 0, or a law that does not fit its control.
    """

    def __init__(
        self,
        *,
        prior: Prior,
        kernel: TransitionKernel,
        reward: Reward,
        guidance_strength: float = 1.0,
        control_law: ControlLaw | None = None,
    ) -> None:
        super().__init__()
        if not (guidance_strength > 0 and math.isfinite(guidance_strength)):
            raise ConfigError(
                f"env.guidance_strength={guidance_strength} must be > 0: it multiplies "
                "log p(y|sample), and 0 would ask for nothing; use 1 for the Bayes conditional"
            )
        self.prior = prior
        self.kernel = kernel
        self.reward_model = reward
        self.guidance_strength = float(guidance_strength)
        self.controls = dict(reward.controls)
        self.control_law = control_law or BalancedLaw()
        for num_labels in self.controls.values():
            self.control_law.check(num_labels)
        self.prior_calls = 0  # evaluations of the prior's network, counted in samples
        self.reward_calls = 0  # evaluations of the reward, counted in samples

    @property
    def num_steps(self) -> int:
        """K, the number of stochastic steps."""
        return self.kernel.num_steps

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self.prior.shape

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one clean sample."""
        device = self.kernel.scale.device
        with torch.no_grad():
            return tuple(self.prior.decode(torch.zeros(1, *self.shape, device=device)).shape[1:])

    @property
    def reward_upper_bound(self) -> float | None:
        """Nats that gamma * reward never exceeds, or None."""
        bound = self.reward_model.upper_bound
        return None if bound is None else self.guidance_strength * bound

    @property
    def conditions(self) -> list[dict[str, int]]:
        """Every combination of labels, without null labels."""
        names = list(self.controls)
        ranges = (range(self.controls[name]) for name in names)
        return [dict(zip(names, labels, strict=True)) for labels in itertools.product(*ranges)]

    def draw_start(self, n: int, generator: torch.Generator) -> Tensor:
        """x_0 ~ N(0, I): [n, *S]."""
        return torch.randn(n, *self.shape, generator=generator, device=generator.device)

    def draw_control(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Labels from the control law, each [n] int64."""
        return {
            name: self.control_law.draw(n, num_labels, generator)
            for name, num_labels in self.controls.items()
        }

    def check_control(
        self, control: Mapping[str, int | Sequence[int] | Tensor], n: int
    ) -> dict[str, Tensor]:
        """Turn given labels into tensors [n] int64 on the process's device.

        Args:
            control: a label or [n] labels by name of the control; a control that is missing gets
                its null label.
            n: number of episodes.

        Raises:
            ConfigError: a control or a label that does not exist.
        """
        device = self.kernel.scale.device
        for name in control:
            if name not in self.controls:
                hint = did_you_mean(name, self.controls)
                raise ConfigError(f"unknown control '{name}'; {hint}")
        checked = {}
        for name, num_labels in self.controls.items():
            label = torch.as_tensor(control.get(name, num_labels), device=device)
            if label.is_floating_point() or ((label < 0) | (label > num_labels)).any():
                raise ConfigError(
                    f"control {name}={label.tolist()} is out of range; use whole labels 0 to "
                    f"{num_labels - 1}, or {num_labels} for the null label"
                )
            if label.shape not in ((), (n,)):
                raise ConfigError(
                    f"control {name} has shape {tuple(label.shape)}; give one label, or {n} labels"
                )
            checked[name] = label.long().expand(n).clone()
        return checked

    def prior_loc(self, x: Tensor, step: Tensor) -> Tensor:
        """The prior's mean of the next latent [B, *S] at latents [B, *S] and steps [B].

        At step K it is the read-out's result: the noise-free last step, or x itself where the
        scheduler has none.
        """
        read_out = int(step[0]) == self.num_steps  # episodes of a batch are in step
        if read_out and not self.kernel.has_read_out:
            return x
        self.prior_calls += len(x)
        denoised = self.prior.denoiser(x, self.kernel.timesteps[step])
        return self.kernel.mean(x, denoised, step)

    def clean_estimate(self, x: Tensor, step: Tensor) -> Tensor:
        """The prior's estimate of the clean latent [B, *S] at latents [B, *S] and steps [B].

        Made in one call, clipped as the kernel does; at step K it is the read-out's result.
        """
        if int(step[0]) == self.num_steps:  # episodes of a batch are in step
            return self.prior_loc(x, step)
        self.prior_calls += len(x)
        denoised = self.prior.denoiser(x, self.kernel.timesteps[step])
        return denoised if self.kernel.clip is None else self.kernel.clip(denoised)

    def reward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Reward times guidance strength: [B] nats."""
        self.reward_calls += len(sample)
        return self.guidance_strength * self.reward_model(sample, control)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the prior's activations in the backward pass."""
        self.prior.denoiser.checkpointing = enabled
