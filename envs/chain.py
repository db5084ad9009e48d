"""The denoising MDP, shared by the TorchRL env and the Gymnasium envs.

K stochastic steps. State s_k = (x_k, k, c, y), c a prompt if the prior has any; action
a_k = x_{k+1}; the transition is deterministic. Start x_0 ~ N(0, I). After the last action the
read-out (the scheduler's noise-free last step, done by the frozen prior) and the decoder turn x_K
into a clean sample, with the reward

    r(sample, y) = guidance_strength * reward(sample, y)    [nats]

The other half of the objective, -KL(pi || p_ref) per step, is a function of policy and prior and is
formed where both are known.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.conditions import Conditions, checked_values
from ctrl_rl.controls import Categorical, Values
from ctrl_rl.envs.control_laws import BalancedLaw, ControlLaw
from ctrl_rl.errors import ConfigError, NonFiniteError
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.networks.execution import in_parts
from ctrl_rl.priors import Prior
from ctrl_rl.rewards import Reward
from ctrl_rl.rewards.reward import check_reward_values


class DenoisingProcess(nn.Module):
    """Prior x kernel x reward: everything of the MDP but the agent.

    Args:
        prior: frozen pretrained model.
        kernel: Gaussian transitions.
        reward: reward of clean samples, in nats.
        guidance_strength: gamma > 0; the target is p(sample) p(y | sample)^gamma.
        control_law: law of the values of every control; None is `BalancedLaw`.

    Attributes:
        conditions: all of the task's: prompts where the prior has any, and values of every control.
        execution: how prior, decoder and reward are run.

    Raises:
        ConfigError: guidance_strength <= 0, a law that does not fit its control, a reward that
            reads prompts on a prior without any, or names that do not tell labels apart.
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
        self.prior, self.execution = prior, prior.execution
        self.kernel = kernel
        self.reward_model = reward
        self.guidance_strength = float(guidance_strength)
        self.controls = reward.controls
        if prior.prompts and keys.PROMPT in self.controls:
            raise ConfigError(
                f"the reward has a control named '{keys.PROMPT}', which is what the prior's own "
                "condition is called; give the control another name"
            )
        if reward.reads_prompts:
            if not prior.prompts:
                raise ConfigError(
                    "the reward scores samples for their prompts, and this prior has none; use a "
                    "text-to-image model, such as prior=diffusers with prior.prompts"
                )
            reward.read_prompts(prior.prompts.all)
        self.conditions = Conditions(self.controls)
        if prior.prompts:
            known = prior.prompts.all
            self.conditions = Conditions(
                {keys.PROMPT: Categorical(known), **self.controls},
                [known.index(prompt) for prompt in prior.prompts.evaluation],
            )
        self.control_law = control_law or BalancedLaw()
        for name, control in self.controls.items():
            self.control_law.check(name, control)
        self.reward_calls = 0  # evaluations of the reward, counted in samples

    @property
    def prior_calls(self) -> int:
        """Evaluations of the prior's network, counted in samples."""
        return self.prior.denoiser.calls

    @prior_calls.setter
    def prior_calls(self, calls: int) -> None:
        self.prior.denoiser.calls = calls

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

    def draw_start(self, n: int, generator: torch.Generator) -> Tensor:
        """x_0 ~ N(0, I): [n, *S]."""
        return torch.randn(n, *self.shape, generator=generator, device=generator.device)

    def draw_control(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Values from the control law, and training prompts: each [n]."""
        drawn = {
            name: self.control_law.draw(n, control, generator)
            for name, control in self.controls.items()
        }
        if self.prior.prompts:
            training = Categorical(self.prior.prompts.training)  # these come first
            drawn = {keys.PROMPT: BalancedLaw().draw(n, training, generator), **drawn}
        return drawn

    def check_control(self, control: Mapping[str, Values], n: int) -> dict[str, Tensor]:
        """Turn given values into tensors [n] on the process's device.

        Args:
            control: a value or [n] values by name of the control, and prompts by "prompt": numbers,
                or labels by name or place; a missing control, or "any", asks for nothing.
            n: number of episodes.

        Raises:
            ConfigError: a control or a value that does not exist.
        """
        return checked_values(control, self.conditions.controls, n, self.kernel.scale.device)

    def prior_loc(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The prior's mean of the next latent [B, *S] at latents [B, *S] and steps [B].

        It reads only the prompts of `control`, if any. At step K it is the read-out's result:
        the noise-free last step, or x itself where the scheduler has none.
        """
        if self._at_read_out(step) and not self.kernel.has_read_out:
            return x
        return self.kernel.mean(x, self._denoised(x, step, control), step)

    def clean_estimate(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The prior's estimate of the clean latent [B, *S] at latents [B, *S] and steps [B].

        Made in one call, clipped as in the kernel; at step K it is the read-out's result.
        """
        if self._at_read_out(step):
            return self.prior_loc(x, step, control)
        denoised = self._denoised(x, step, control)
        return denoised if self.kernel.clip is None else self.kernel.clip(denoised)

    def _at_read_out(self, step: Tensor) -> bool:
        """Whether all steps [B] are K; refuses a batch in which only some are."""
        ended = int((step == self.num_steps).sum())
        if 0 < ended < len(step):
            raise ConfigError(
                f"{ended} of {len(step)} latents are at step {self.num_steps}, the read-out, and "
                "the others are not; the latents of one call must all be at it, or none"
            )
        return ended > 0

    def _denoised(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        prompt = control.get(keys.PROMPT)
        denoised: Tensor = self.prior.denoiser(x, self.kernel.timesteps[step], prompt=prompt)
        return denoised

    def reward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Reward times guidance strength: [B] nats.

        Raises:
            NonFiniteError: a sample or its reward is not finite; names its condition.
            ConfigError: the reward's result is not floating point [B].
        """
        # A reward may hide it: an encoder's file of NaN is small, and a crop may cut it away.
        self.check_sample(sample, control)
        self.reward_calls += len(sample)

        def rewarded(sample: Tensor, *labels: Tensor) -> Tensor:
            reward: Tensor = self.reward_model(sample, dict(zip(control, labels, strict=True)))
            check_reward_values(reward, len(sample), type(self.reward_model).__name__)
            return reward

        rows = self.execution.microbatch
        reward = in_parts(rewarded, sample, *control.values(), rows=rows, recompute=False)
        reward = self.guidance_strength * reward
        self._check_finite(reward, control, "the reward is {value} for {named}")
        return reward

    def check_sample(self, sample: Tensor, control: Mapping[str, Tensor]) -> None:
        """Refuse samples [B, *D] that nobody can use.

        Raises:
            NonFiniteError: one is not finite; names its condition.
        """
        self._check_finite(
            sample,
            control,
            "a sample has a value of {value} for {named}: prior or policy has diverged; try a "
            "lower trainer.learning_rate, or float32 for a prior in half precision",
        )

    def _check_finite(self, values: Tensor, control: Mapping[str, Tensor], message: str) -> None:
        """Refuse values [B, ...] with the first one that is not finite, and its condition."""
        good = torch.isfinite(values)
        if not good.all():
            row, *place = (~good).nonzero()[0].tolist()
            asked = {name: value[row].item() for name, value in control.items()}
            named, value = self.conditions.name(asked), values[(row, *place)].item()
            raise NonFiniteError(message.format(value=value, named=named))

    def value_of_clean(self, latent: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """The reward of clean latents [B, *S] once decoded: [B] nats."""
        return self.reward(self.prior.decode(latent), control)

    def predict(self, sample: Tensor) -> dict[str, Tensor] | None:
        """Values of each control that samples show, each [B]; None if the reward does not say."""
        parts = sample.split(self.execution.microbatch or max(len(sample), 1))
        predictions = [self.reward_model.predict(part) for part in parts]
        known = [labels for labels in predictions if labels is not None]
        if not known:
            return None
        return {name: torch.cat([labels[name] for labels in known]) for name in known[0]}

    def compile_network(self, backend: str) -> bool:
        """Compile the prior's network; returns whether it has one."""
        return self.prior.denoiser.compile_network(backend)
