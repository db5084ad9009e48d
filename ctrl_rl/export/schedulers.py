"""Samplers of this project as diffusers schedulers, for pipelines.

Pipelines look at the signatures of a scheduler's methods for what these take, so they are kept.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from ctrl_rl.errors import check_choice
from ctrl_rl.kernels.accepted import FLOW
from ctrl_rl.kernels.flow import flow_sde_tables, flow_settings
from ctrl_rl.kernels.schedulers import trim
from ctrl_rl.kernels.settings import CLASS, changed, scheduler_settings


class FlowSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """The stock scheduler of flow matching with noise in every step but the last.

        own = pipeline.scheduler.config
        pipeline.scheduler = FlowSDEScheduler.from_config(own, noise_level=0.7)

    It is the sampler of `kernel=flow_sde`. Flow pipelines do not pass their generator to the
    scheduler, so `draw` takes its place.

    Attributes:
        draw: gives standard normal noise in the shape of latents; None draws it with torch's
            default generator.
    """

    config: Any
    sigmas: Any
    step_index: Any
    _init_step_index: Any
    _step_index: Any
    draw: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], noise_level: float | None = None, **more: Any
    ) -> Any:
        """Make one from any flow scheduler's config.

        Args:
            config: its own config, or the stock scheduler's.
            noise_level: > 0, see `ctrl_rl.kernels.flow_sde_kernel`; None for the config's, or 0.7
                if it has none.
            **more: as for the stock scheduler.

        Raises:
            ConfigError: a scheduler that is not read, or not of flow matching.
        """
        own = config.get("noise_level", 0.7) if noise_level is None else noise_level
        if config.get(CLASS) == cls.__name__:
            config = {**config, CLASS: FlowMatchEulerDiscreteScheduler.__name__}
        stock = {key: value for key, value in config.items() if key != "noise_level"}
        read = scheduler_settings({**stock, "prediction_type": FLOW})
        made = super().from_config(flow_settings(read), **more)
        scheduler = made[0] if isinstance(made, tuple) else made  # with the unused settings
        scheduler.register_to_config(noise_level=own)
        return made

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """The next latents, as the stock scheduler gives them."""
        if self.step_index is None:
            self._init_step_index(timestep)
        k, sigmas = self.step_index, self.sigmas.cpu().double()
        noise_weight, scale = flow_sde_tables(sigmas, self.config.noise_level)
        velocity, x = model_output.float(), sample.float()
        denoised = x - float(sigmas[k]) * velocity
        after = (1 - float(sigmas[k + 1])) * denoised
        after = after + float(noise_weight[k]) * (denoised + velocity)
        if scale[k] > 0:
            noise = torch.randn_like(x) if self.draw is None else self.draw(x)
            after = after + float(scale[k]) * noise
        self._step_index += 1
        after = after.to(model_output.dtype)
        if not return_dict:
            return (after,)
        output: Any = FlowMatchEulerDiscreteSchedulerOutput
        return output(prev_sample=after)


class VisitedDDPMScheduler(DDPMScheduler):
    """The stock scheduler without the timestep -1 that it has in some `trailing` spacings."""

    timesteps: Any

    @wraps(DDPMScheduler.set_timesteps)
    def set_timesteps(self, *given: Any, **named: Any) -> None:
        """As the stock scheduler, see `ctrl_rl.kernels.schedulers`."""
        stock: Any = super()
        stock.set_timesteps(*given, **named)
        trim(self)


class VisitedDDIMScheduler(DDIMScheduler):
    """The stock scheduler with steps that lead to the next timestep which is visited.

    It is the sampler of `kernel=ddim`, which says where that differs from the stock scheduler's. A
    step is the stock one on a schedule of the visited timesteps alone, where the next is one below.
    """

    config: Any
    timesteps: Any
    alphas_cumprod: Any
    final_alpha_cumprod: Any
    _visited: Any

    @wraps(DDIMScheduler.set_timesteps)
    def set_timesteps(self, *given: Any, **named: Any) -> None:
        """As the stock scheduler."""
        stock: Any = super()
        stock.set_timesteps(*given, **named)
        trim(self)
        number = len(self.timesteps)
        self._visited = DDIMScheduler.from_config(self.config, num_train_timesteps=number)
        self._visited.alphas_cumprod = self.alphas_cumprod[self.timesteps.cpu().flip(0)]
        self._visited.final_alpha_cumprod = self.final_alpha_cumprod
        self._visited.num_inference_steps = number

    @wraps(DDIMScheduler.step)
    def step(self, model_output: Tensor, timestep: Any, *given: Any, **named: Any) -> Any:
        """The next latents, as the stock scheduler gives them."""
        place = int((self.timesteps == timestep).nonzero()[0])
        below = len(self.timesteps) - 1 - place
        return self._visited.step(model_output, below, *given, **named)


class UnitStartEulerAncestralScheduler(EulerAncestralDiscreteScheduler):
    """The stock scheduler of ancestral Euler steps, from the start N(0, I) of `euler_ancestral`.

    In the stock scheduler's larger units that is a standard deviation of sqrt(sigma^2 + 1) for
    every spacing of timesteps; the stock one takes sigma for two of the three.
    """

    sigmas: Any
    timesteps: Any

    @wraps(EulerAncestralDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *given: Any, **named: Any) -> None:
        """As the stock scheduler, without the timestep -1 of some `trailing` spacings."""
        stock: Any = super()
        stock.set_timesteps(*given, **named)
        trim(self)

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the first latents."""
        return (self.sigmas.max() ** 2 + 1) ** 0.5


SCHEDULERS: dict[str, Any] = {  # by name, those of exported runs
    kind.__name__: kind
    for kind in (
        DDIMScheduler,
        DDPMScheduler,
        FlowSDEScheduler,
        UnitStartEulerAncestralScheduler,
        VisitedDDIMScheduler,
        VisitedDDPMScheduler,
    )
}


def scheduler_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The scheduler whose steps are an exported run's kernel.

    Args:
        settings: contents of control.json: `scheduler`, its class, `scheduler_settings`, and the
            `scheduler_config` of `prior.scheduler`, which earlier releases do not have.
        config: of the base model's scheduler.

    Raises:
        ConfigError: no run has such a scheduler, or the base model's is not one that priors are
            read from.
    """
    check_choice("scheduler", settings["scheduler"], SCHEDULERS)
    kind = SCHEDULERS[settings["scheduler"]]
    read = scheduler_settings(changed(config, settings.get("scheduler_config")))
    read = {"clip_sample": False, **read}  # as in the run's prior
    return kind.from_config(read, **settings["scheduler_settings"])
