r"""The control env: Gymnasium, for any off-the-shelf agent.

The env owns the noise and the agent steers the prior's drift. With u = control_scale * action,

    x_{k+1} = prior_loc(x_k, k) + scale_k * (u + noise),      noise ~ N(0, I),
    reward_k = -|u|^2 / 2      (+ gamma log p(y | sample) at the end)      [nats]

|u|^2 / 2 is exactly KL(N(prior_loc + scale u, scale^2) || N(prior_loc, scale^2)). The plain
expected return is therefore the soft return J, and no entropy bonus is needed to stay near the
prior.

An action outside the box acts as it is and pays its own KL; nothing is clipped. A clipped action
would not be the one whose log-probability the agent keeps, and beyond the box a larger one would
cost no more, so nothing would pull the agent back. Agents that squash or clip their actions stay in
the box by themselves.
"""

import hashlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.dynamics import (
    ControlDynamics,
    Observation,
    checked_action,
    checked_options,
    copied,
)
from ctrl_rl.envs.frames import RENDERING, Frame
from ctrl_rl.errors import ConfigError, check_choice


class ControlEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Denoising as a Gymnasium environment.

    ## Description
    Steer a pretrained diffusion model by a drift towards samples that meet the condition.

    ## Action Space
    `Box(-1, 1, S, float32)`, times `control_scale`: drift in standard deviations of the step.
    Actions outside the box are taken as they are and pay their own KL. Actions that are not finite
    are refused.

    ## Observation Space
    `x` (latent), `step` (0 .. K), `control_<name>` (a label, the last one being the
    null label, or a number, NaN where it asks for nothing).

    ## Rewards
    -KL of the step, plus guidance_strength * log p(y | sample) at the last one, in nats.

    ## Starting State
    x ~ N(0, I), condition from the task's law, or `reset(options={"control": {"digit": 3}})`.

    ## Episode End
    Terminates after K steps; `info["sample"]` is then the clean sample. Never truncates.

    ## Arguments
    `gymnasium.make("ctrl_rl.envs:ctrl_rl/Digits-v0", overrides=["kernel.num_steps=20"])`: any
    overrides of the task's config. `render_mode="rgb_array"`: `render` gives the prior's clean
    estimate as a picture, or, where samples are no images, the path of the latent.

    ## Vectorized environment
    `gymnasium.make_vec` gives a `ControlVectorEnv`: one network call for all episodes.

    ## Version History
    v0: first version.

    Args:
        process: the MDP.
        control_scale: drift of an action of 1, in standard deviations of the step.
        render_mode: "rgb_array", or None to draw nothing.

    Raises:
        ConfigError: a setting out of range; an action of another shape or not finite; an unknown
            option; a step before `reset` or after the end.
    """

    metadata = dict(RENDERING)

    def __init__(
        self,
        process: DenoisingProcess,
        *,
        control_scale: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        self._dynamics = ControlDynamics(
            process, num_envs=1, control_scale=control_scale, render_mode=render_mode
        )
        self.process, self.control_scale = process, self._dynamics.control_scale
        self.observation_space = self._dynamics.observation_space
        self.action_space = self._dynamics.action_space
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `options={"control": {name: label}}` fixes the condition."""
        control = checked_options(options, ["control"]).get("control")
        first = self._np_random is None
        super().reset(seed=seed)
        if seed is not None or first:
            self._dynamics.seed(self.np_random)
        return _observation_of(self._dynamics.reset(control), 0), {}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by one denoising step."""
        reward, kl, sample = self._dynamics.step(
            checked_action(action, self.action_space.shape)[None]
        )
        observation = _observation_of(self._dynamics.observation(), 0)
        info = {name: value[0] for name, value in _info(kl, sample).items()}
        return observation, float(reward[0]), sample is not None, False, info

    def render(self) -> Frame | None:
        """The episode as a frame [H, W, 3] uint8; see `ctrl_rl.envs.frames`.

        It costs a call of the prior where samples are images. Results do not depend on it.
        """
        frames = self._dynamics.frames()
        return None if frames is None else frames[0]


class ControlVectorEnv(VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):
    """B control envs in one: every step is one batched call of the prior's network.

    Episodes have equal lengths and stay in step, so they end and begin together. The three modes of
    `autoreset_mode` are Gymnasium's: after the last step,

    - `NEXT_STEP`: the next call of `step` ignores its actions and begins new episodes;
    - `SAME_STEP`: new episodes have begun, with the ends in `info["final_obs"]` and
      `info["final_info"]`;
    - `DISABLED`: call `reset`. It is the mode for TorchRL's `GymWrapper`.

    Args:
        process: the MDP.
        num_envs: B.
        control_scale: drift of an action of 1, in standard deviations of the step.
        autoreset_mode: a mode, or its value: "NextStep", "SameStep" or "Disabled".
        render_mode: "rgb_array", or None to draw nothing.

    Raises:
        ConfigError: as `ControlEnv`, and seeds or a mask that do not fit the episodes.
    """

    metadata = {**RENDERING, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        process: DenoisingProcess,
        *,
        num_envs: int,
        control_scale: float = 1.0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        self._dynamics = ControlDynamics(
            process, num_envs=num_envs, control_scale=control_scale, render_mode=render_mode
        )
        if not isinstance(autoreset_mode, AutoresetMode):
            check_choice("autoreset_mode", autoreset_mode, [mode.value for mode in AutoresetMode])
        self.process, self.control_scale = process, self._dynamics.control_scale
        self.num_envs = num_envs
        self.single_observation_space = self._dynamics.observation_space
        self.single_action_space = self._dynamics.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self._ended = False

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start B episodes.

        Args:
            seed: one for all, as one generator draws for all episodes. A list of B seeds is as good
                as one seed: the same list gives the same episodes, another list others. None, or a
                list of None, goes on.
            options: "control" fixes the condition, see `DenoisingProcess.check_control`;
                "reset_mask" is an array [B] of True.
        """
        given = checked_options(options, ["control", "reset_mask"])
        if "reset_mask" in given:
            _check_mask(given["reset_mask"], self.num_envs)
        if isinstance(seed, list | tuple | np.ndarray):
            seed = _joint_seed(list(seed), self.num_envs)
        first = self._np_random is None
        super().reset(seed=seed)
        if seed is not None or first:
            self._dynamics.seed(self.np_random)
        self._ended = False
        return self._dynamics.reset(given.get("control")), {}

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Advance all episodes by one denoising step."""
        none = np.zeros(self.num_envs, dtype=bool)
        if self._ended and self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._ended = False
            return self._dynamics.reset(None), np.zeros(self.num_envs), none, none.copy(), {}
        reward, kl, sample = self._dynamics.step(checked_action(actions, self.action_space.shape))
        self._ended = sample is not None
        observation, info = self._dynamics.observation(), self._masked(_info(kl, sample))
        if self._ended and self.autoreset_mode == AutoresetMode.SAME_STEP:
            ends = np.empty(self.num_envs, dtype=object)
            ends[:] = [_observation_of(observation, each) for each in range(self.num_envs)]
            info = self._masked({"final_obs": ends, "final_info": info})
            observation = self._dynamics.reset(None)
        ended = np.full(self.num_envs, self._ended)
        return observation, reward.double().numpy(force=True), ended, none, info

    def render(self) -> tuple[Frame, ...] | None:
        """The episodes as B frames [H, W, 3] uint8; see `ctrl_rl.envs.frames`.

        They cost one batched call of the prior where samples are images. Results do not depend on
        them.
        """
        return self._dynamics.frames()

    def _masked(self, info: dict[str, Any]) -> dict[str, Any]:
        """Gymnasium's masks beside the values: every episode has them."""
        present = {f"_{name}": np.ones(self.num_envs, dtype=bool) for name in info}
        return info | present


def _info(kl: Tensor, sample: Tensor | None) -> dict[str, NDArray[Any]]:
    return {"kl": copied(kl)} | ({} if sample is None else {"sample": copied(sample)})


def _observation_of(batch: Observation, episode: int) -> Observation:
    """That of one episode; numbers as arrays without dimensions, as their spaces require."""
    one = {name: value[episode] for name, value in batch.items()}
    numbers = {k: np.asarray(v) for k, v in one.items() if isinstance(v, np.floating)}
    return one | numbers


def _joint_seed(seeds: list[Any], num_envs: int) -> int | None:
    """One seed from a list of them."""
    if len(seeds) != num_envs:
        raise ConfigError(f"{len(seeds)} seeds for {num_envs} episodes; give one for each, or one")
    if all(seed is None for seed in seeds):
        return None
    for seed in seeds:
        if not (isinstance(seed, int | np.integer) and seed >= 0):
            raise ConfigError(
                f"seed {seed!r} in a list: one generator draws for all episodes, so give a whole "
                "number of 0 or more for each, or None for each"
            )
    text = " ".join(str(int(seed)) for seed in seeds)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _check_mask(mask: Any, num_envs: int) -> None:
    """Refuse a mask of episodes to reset that is not all of them."""
    if not (isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == (num_envs,)):
        raise ConfigError(f"options['reset_mask'] must be a NumPy array of {num_envs} booleans")
    if not mask.all():
        left = ", ".join(map(str, np.flatnonzero(~mask)))
        raise ConfigError(
            f"options['reset_mask'] leaves out episode(s) {left}; the episodes of this env are in "
            "step, so reset all of them at once"
        )
