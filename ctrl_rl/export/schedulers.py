"""Samplers of this project as diffusers schedulers, for pipelines."""

from collections.abc import Callable, Mapping
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
from ctrl_rl.kernels.flow import flow_sde_tables, flow_settings


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
        """
        own = config.get("noise_level", 0.7) if noise_level is None else noise_level
        made = super().from_config(flow_settings(config), **more)
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


class UnitStartEulerAncestralScheduler(EulerAncestralDiscreteScheduler):
    """The stock scheduler of ancestral Euler steps, from the start N(0, I) of `euler_ancestral`.

    In the stock scheduler's larger units that is a standard deviation of sqrt(sigma^2 + 1) for
    every spacing of timesteps; the stock one takes sigma for two of the three.
    """

    sigmas: Any

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
    )
}


def scheduler_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The scheduler whose steps are an exported run's kernel.

    Args:
        settings: contents of control.json: `scheduler`, its class, and `scheduler_settings`.
        config: of the base model's scheduler.

    Raises:
        ConfigError: no run has such a scheduler.
    """
    check_choice("scheduler", settings["scheduler"], SCHEDULERS)
    kind = SCHEDULERS[settings["scheduler"]]
    config = {"clip_sample": False, **config}  # as in the run's prior
    return kind.from_config(config, **settings["scheduler_settings"])
