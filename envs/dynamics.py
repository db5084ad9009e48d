"""B denoising episodes in step, steered by drifts: what the two Gymnasium envs share."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from ctrl_rl import gaussian
from ctrl_rl.controls import Continuous, Control
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.frames import RENDERING, Camera, Frame
from ctrl_rl.errors import ConfigError, check_choice, check_sizes, did_you_mean, one_line

Observation = dict[str, Any]


class ControlDynamics:
    """The MDP of `ctrl_rl.envs.control` for B episodes.

    Args:
        process: the MDP.
        num_envs: B.
        control_scale: drift of an action of 1, in standard deviations of the step.
        render_mode: "rgb_array", or None to draw nothing.

    Attributes:
        observation_space: of one episode.
        action_space: of one episode.
        step_index: 0 .. K, or None before the first reset.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        process: DenoisingProcess,
        *,
        num_envs: int,
        control_scale: float,
        render_mode: str | None,
    ) -> None:
        check_sizes("", num_envs=num_envs)
        if not 0 < control_scale < math.inf:
            raise ConfigError(f"control_scale={control_scale} must be > 0 and finite")
        if render_mode is not None:
            check_choice("render_mode", render_mode, RENDERING["render_modes"])
        self.process = process
        self.num_envs = num_envs
        self.control_scale = float(control_scale)
        self.generator = torch.Generator(device=process.kernel.scale.device)
        self.step_index: int | None = None
        self._camera = None if render_mode is None else Camera(process)
        # Finite bounds: Gymnasium warns about infinite ones, and no latent comes near float32's.
        limit = np.finfo(np.float32).max
        self.observation_space = spaces.Dict(
            {
                "x": spaces.Box(-limit, limit, process.shape, np.float32),
                "step": spaces.Discrete(process.num_steps + 1),
                **{
                    f"control_{name}": _space(control)
                    for name, control in process.conditions.controls.items()
                },
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, process.shape, np.float32)

    def seed(self, source: np.random.Generator) -> None:
        """Restart the random numbers from a draw of Gymnasium's own generator."""
        self.generator.manual_seed(int(source.integers(2**63)))

    @torch.no_grad()
    def reset(self, control: Mapping[str, Any] | None) -> Observation:
        """Start B episodes; None draws the values of controls."""
        n = self.num_envs
        if control is not None:
            control = self.process.check_control(control, n)
        self.step_index = 0
        self.x = self.process.draw_start(n, self.generator)
        self.control = self.process.draw_control(n, self.generator) if control is None else control
        self.prior_loc = self._prior_loc(0)
        if self._camera is not None:
            self._camera.start(self.x)
        return self.observation()

    @torch.no_grad()
    def step(self, action: NDArray[np.float32]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Advance by an action [B, *S], see `checked_action`.

        Returns:
            Reward [B] and KL [B] in nats, and the samples [B, *D] where episodes ended.

        Raises:
            ConfigError: no episode has begun, the last one has ended, or the action's KL is not
                finite.
        """
        k, last = self.step_index, self.process.num_steps
        if k is None or k == last:
            state = "no episode has begun" if k is None else f"the episode ended at step {last}"
            raise ConfigError(f"{state}; call reset() to start one, then step()")
        drift, kl = drift_of(action, self.control_scale, self.x.device)
        scale = self.process.kernel.scale[k].expand(self.num_envs)
        loc = self.prior_loc + gaussian.expand_to(scale, drift) * drift
        self.x = gaussian.draw(loc, scale, self.generator)
        self.step_index = k + 1
        self.prior_loc = self._prior_loc(k + 1)
        if self._camera is not None:
            self._camera.follow(self.x)
        if k + 1 < last:
            return -kl, kl, None
        sample = self.process.prior.decode(self.prior_loc)
        if self._camera is not None:
            self._camera.follow(sample)
        return self.process.reward(sample, self.control) - kl, kl, sample

    def observation(self) -> Observation:
        """Copies: editing an observation does not edit the state."""
        assert self.step_index is not None  # only asked for in an episode
        step = torch.full((self.num_envs,), self.step_index)
        return observation_of(self.x, step, self.control)

    def frames(self) -> tuple[Frame, ...] | None:
        """B frames [H, W, 3] uint8, or, with a warning, None if the env has no render mode.

        Raises:
            ConfigError: no episode has begun.
        """
        if self._camera is None:
            gymnasium.logger.warn(
                "render() draws nothing in an env without a render mode; make it with "
                "render_mode='rgb_array'"
            )
            return None
        if self.step_index is None:
            raise ConfigError("there is nothing to render; call reset() first")
        return self._camera.frames(self.x, self.step_index, self.control)

    def _prior_loc(self, k: int) -> Tensor:
        step = torch.full((self.num_envs,), k, device=self.x.device)
        return self.process.prior_loc(self.x, step, self.control)


def checked_action(action: Any, shape: tuple[int, ...] | None) -> NDArray[np.float32]:
    """A copy of an action, float32 of a space's shape; it may be out of the box.

    Raises:
        ConfigError: another shape, or anything but real numbers.
    """
    try:
        array = np.asarray(action)
    except (RuntimeError, TypeError, ValueError) as error:  # ragged lists, tensors on a GPU
        raise ConfigError(f"the action is no NumPy array: {one_line(error)}") from error
    if array.shape != shape:
        raise ConfigError(
            f"the action has shape {array.shape}; give {shape}, as action_space.sample() does"
        )
    if not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise ConfigError(f"the action is of type {array.dtype}; give float32, or real numbers")
    with np.errstate(over="ignore"):  # what becomes infinite is refused with its KL
        return array.astype(np.float32)


def drift_of(
    action: NDArray[np.float32], control_scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What an action [B, *S] does, see `checked_action`.

    Returns:
        Drift [B, *S] in standard deviations of the step, and its KL [B] in nats.

    Raises:
        ConfigError: the KL is not finite.
    """
    drift = control_scale * torch.as_tensor(action, device=device)
    kl = drift.flatten(1).square().sum(1) / 2
    if not kl.isfinite().all():
        place = int((~kl.isfinite()).nonzero()[0])
        raise ConfigError(
            f"the action of episode {place} reaches {np.abs(action[place]).max():g}; actions "
            "must be finite, and their KL too"
        )
    return drift, kl


def observation_of(x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Observation:
    """What an agent sees of latents [B, *S], steps [B] and values [B] by control, in copies."""
    values = {f"control_{name}": copied(value) for name, value in control.items()}
    return {"x": copied(x), "step": copied(step), **values}


def checked_options(
    options: Mapping[str, Any] | None, accepted: Collection[str]
) -> Mapping[str, Any]:
    """Options of `reset`.

    Raises:
        ConfigError: an unknown option, or controls that are no mapping.
    """
    options = options or {}
    for name in options:
        if name not in accepted:
            raise ConfigError(f"unknown reset option '{name}'; {did_you_mean(name, accepted)}")
    control = options.get("control")
    if not isinstance(control, Mapping | None):
        kind = type(control).__name__
        raise ConfigError(
            f"options['control'] is of type {kind}; give values by name, such as {{'digit': 3}}"
        )
    return options


def copied(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array of its own."""
    return tensor.numpy(force=True).copy()


def _space(control: Control) -> spaces.Space[Any]:
    """Labels and the null label, or an interval."""
    if isinstance(control, Continuous):
        return spaces.Box(control.low, control.high, (), np.float32)
    return spaces.Discrete(int(control.size) + 1)
