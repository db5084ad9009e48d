"""Signal levels of a diffusers scheduler's config, which priors and kernels share."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def signal_levels(scheduler_config: Mapping[str, Any]) -> Tensor:
    """Signal level alpha_bar of every training timestep: [num_train_timesteps] float32."""
    from diffusers import DDPMScheduler

    levels: Tensor = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
    return levels.float()
