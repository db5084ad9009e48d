"""stable-baselines3 on the control env: its vector env, and its models' actions.

    envs = ControlVecEnv(gymnasium.make_vec("ctrl_rl.envs:ctrl_rl/Mixture2d-v0", num_envs=64))
    model = PPO("MultiInputPolicy", envs).learn(200_000)
    ctrl_rl.evaluate_policy("mixture2d", actions_of(model)).summary["gap_nats_certified"]

Needs ``pip install "ctrl-rl[sb3]"``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from ctrl_rl.envs.dynamics import Observation
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.foreign import Act

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise ConfigError(
        "ctrl_rl.integrations.sb3 needs a package that is not here: pip install 'ctrl-rl[sb3]'"
    ) from error


class ControlVecEnv(VecEnv):  # type: ignore[misc]
    """A batched control env as stable-baselines3 takes its envs.

    Every step is one call of the prior for all episodes, without processes or threads. New episodes
    begin within the step that ends the old ones, whose last observation is then in
    `info["terminal_observation"]`. Infos have "kl" [nats] and, at the end, "sample" [*D].
    Numeric controls are arrays of one number, which this library's networks need.

    Args:
        envs: what `gymnasium.make_vec` makes of a task, with vector wrappers or without;
            `autoreset_mode` "NextStep" or "Disabled".

    Raises:
        ConfigError: no vector env, or one that resets in the same step.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(envs, VectorEnv):
            raise ConfigError(
                f"envs is a {type(envs).__name__}; give a vector env, such as "
                "gymnasium.make_vec('ctrl_rl.envs:ctrl_rl/Mixture2d-v0', num_envs=64)"
            )
        if envs.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP:
            raise ConfigError(
                "envs has autoreset_mode SameStep; give 'Disabled' or 'NextStep', as this class "
                "begins new episodes by itself"
            )
        self.envs = envs
        space = envs.single_observation_space
        if not isinstance(space, spaces.Dict):
            raise ConfigError("envs gives observations that are no dict; leave that wrapper out")
        wide = {name: _with_a_dimension(one) for name, one in space.items()}
        super().__init__(envs.num_envs, spaces.Dict(wide), envs.single_action_space)

    def reset(self) -> Observation:
        """Begin new episodes, with the seeds of `seed` and the first of `set_options`."""
        seeds: Any = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observation, _ = self.envs.reset(seed=seeds, options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        return _wide(observation)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Observation, NDArray[Any], NDArray[Any], list[dict[str, Any]]]:
        """Advance all episodes; begin new ones where they ended."""
        observation, reward, ended, _, info = self.envs.step(self._actions)
        observation, given = _wide(observation), ("kl", "sample")
        infos = [{k: info[k][i] for k in given if k in info} for i in range(self.num_envs)]
        if ended.all():  # episodes are in step
            for place, each in enumerate(infos):
                each["terminal_observation"] = {k: v[place] for k, v in observation.items()}
                each["TimeLimit.truncated"] = False
            observation = _wide(self.envs.reset()[0])
        return observation, reward.astype(np.float32), ended, infos

    def close(self) -> None:
        """Close the envs."""
        self.envs.close()

    def get_images(self) -> Sequence[NDArray[np.uint8]]:
        """A frame per episode, if the envs have a render mode."""
        frames: Any = self.envs.render()
        return frames or []

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the envs, once for every episode asked for."""
        return [getattr(self.envs.unwrapped, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: the episodes share one env."""
        raise ConfigError(f"set_attr('{attr_name}'): the episodes share one env; change that")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refused: the episodes share one env."""
        raise ConfigError(f"env_method('{method_name}'): the episodes share one env; call that")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """None is: wrappers are around the whole."""
        return [False] * len(list(self._get_indices(indices)))


def actions_of(model: Any, *, deterministic: bool = True) -> Act:
    """The actions of a trained model, for `ctrl_rl.evaluate_policy`.

    Args:
        model: of stable-baselines3, without memory, trained on a `ControlVecEnv` that no
            `VecNormalize` wraps.
        deterministic: the mean action, usually the better policy; False draws as in training, and
            pays for its noise.
    """

    def act(observation: Observation) -> NDArray[np.float32]:
        action, _ = model.predict(_wide(observation), deterministic=deterministic)
        return np.asarray(action)

    return act


def _with_a_dimension(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Spaces of one number as arrays of one."""
    if isinstance(space, spaces.Box) and space.shape == ():
        return spaces.Box(space.low[None], space.high[None], (1,), np.float32)
    return space


def _wide(observation: Observation) -> Observation:
    """A batch of observations with numbers [B] as [B, 1]; labels and steps stay [B]."""
    is_number = {k: v.ndim == 1 and v.dtype == np.float32 for k, v in observation.items()}
    return {k: v[:, None] if is_number[k] else v for k, v in observation.items()}
