"""The stochastic flow sampler of `kernel=flow_sde` as a diffusers scheduler, for pipelines."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from ctrl_rl.kernels.flow import flow_sde_tables


class FlowSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """The stock scheduler with noise in every step but the last.

        pipeline.scheduler = FlowSDEScheduler.from_config(pipeline.scheduler.config)

    Pipelines of flow models hand their generator to no scheduler, so it stands here.

    Attributes:
        noise_level: > 0, see `ctrl_rl.kernels.flow_sde_kernel`.
        draw: gives standard normal noise in the shape of latents; None draws it with torch's
            default generator.
    """

    sigmas: Any
    step_index: Any
    _init_step_index: Any
    _step_index: Any
    noise_level: float = 0.7
    draw: Callable[[Tensor], Tensor] | None = None

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
        k = self.step_index
        noise_weight, scale = flow_sde_tables(self.sigmas.double(), self.noise_level)
        velocity, x = model_output.float(), sample.float()
        denoised = x - self.sigmas[k] * velocity
        after = (1 - self.sigmas[k + 1]) * denoised + float(noise_weight[k]) * (denoised + velocity)
        if scale[k] > 0:
            noise = torch.randn_like(x) if self.draw is None else self.draw(x)
            after = after + float(scale[k]) * noise
        self._step_index += 1
        after = after.to(model_output.dtype)
        if not return_dict:
            return (after,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=after)
