"""Your own reward: any Python callable.

A file of three lines, ``my_rewards.py``::

    def brightness(sample, control):  # [B, *D] and {"level": [B]} to [B] nats
        return -(sample.mean(dim=(1, 2, 3)) - control["level"]).square()

and one yaml, ``configs/reward/brightness.yaml``::

    _target_: ctrl_rl.rewards.FunctionReward
    function: my_rewards.brightness
    controls: {level: 2}
    differentiable: true
    upper_bound: 0.0
"""

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ctrl_rl.errors import ConfigError, did_you_mean, import_hint, one_line
from ctrl_rl.rewards.reward import Reward, check_reward_values


class FunctionReward(Reward):
    """A plain callable ``function(sample, control) -> [B] nats`` as a reward.

    It is 0 if nothing is asked for. With several controls, the function sees a null label as the
    index after the last one, and a null number as NaN.

    Args:
        function: the callable, or its dotted path ``module.name``.
        controls: by name a number of labels, their names, or {low: …, high: …} for a number.
        differentiable: whether its result carries a gradient to the sample. If not, it is called
            without one, and agents that need the gradient are refused before any work.
        upper_bound: upper bound in nats, or None; None makes the gap an estimate.

    Raises:
        ConfigError: no such function, or a bound that is not finite; once called, a result that is
            not floating point of shape [B].
    """

    def __init__(
        self,
        *,
        function: str | Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        controls: Mapping[str, Any],
        differentiable: bool,
        upper_bound: float | None = None,
    ) -> None:
        super().__init__()
        if upper_bound is not None and not math.isfinite(upper_bound):
            raise ConfigError(f"upper_bound={upper_bound} must be finite, or null if none is known")
        self.function = _locate(function) if isinstance(function, str) else function
        self.controls = dict(controls)
        self.differentiable = differentiable
        self.upper_bound = upper_bound
        self.requires_grad_(False).eval()  # the function may be a network

    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Call the function and check its result."""
        null = {name: kind.is_null(control[name]) for name, kind in self.controls.items()}
        nothing = torch.stack(list(null.values())).all(0) if null else None
        given = dict(control)
        if nothing is not None:
            # Its result there is dropped; the gradient of a result from NaN could not be.
            for name, kind in self.controls.items():
                given[name] = torch.where(nothing, kind.some_value, control[name])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            result = self.function(sample, given)
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        try:
            reward = torch.as_tensor(result, device=sample.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the reward function {name} gave a {type(result).__name__}, but must give a "
                f"tensor of shape ({len(sample)},), nats per sample ({one_line(error)})"
            ) from error
        check_reward_values(reward, len(sample), f"the reward function {name}")
        reward = reward.float()
        return reward if nothing is None else torch.where(nothing, 0.0, reward)


def _locate(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"function={path} cannot be imported, and must be module.name of a callable: "
            f"{import_hint(module_name, error)}"
        ) from error
    if not callable(getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"function={path}: '{module_name}' has no callable '{name}'; "
            f"{did_you_mean(name, names)}"
        )
    return getattr(module, name)
