r"""The control env: Gymnasium, for any off-the-shelf agent.

The env owns the noise and the agent steers the prior's drift. With u = control_scale * action,

    x_{k+1} = prior_loc(x_k, k) + scale_k * (u + noise),      noise ~ N(0, I),
    reward_k = -|u|^2 / 2      (+ gamma log p(y | sample) at the end)      [nats]

|u|^2 / 2 is exactly KL(N(prior_loc + scale u, scale^2) || N(prior_loc, scale^2)). The plain
expected return is therefore the soft return J, and no entropy bonus is needed to stay near the
prior.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from ctrl_rl import gaussian
from ctrl_rl.controls import Continuous, Control
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError

Observation = dict[str, Any]


def _space(control: Control) -> spaces.Space[Any]:
    """Labels and the null label, or an interval."""
    if isinstance(control, Continuous):
        return spaces.Box(control.low, control.high, (), np.float32)
    return spaces.Discrete(int(control.size) + 1)


class _ControlDynamics:
    """B episodes in step, shared by the single and the vector env."""

    def __init__(self, process: DenoisingProcess, *, num_envs: int, control_scale: float) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs={num_envs} must be 1 or more")
        if not control_scale > 0:
            raise ConfigError(f"control_scale={control_scale} must be > 0")
        self.process = process
        self.num_envs = num_envs
        self.control_scale = float(control_scale)
        self.generator = torch.Generator(device=process.kernel.scale.device)
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

    @torch.no_grad()
    def reset(self, control: dict[str, Any] | None) -> Observation:
        n = self.num_envs
        self.step_index = 0
        self.x = self.process.draw_start(n, self.generator)
        if control is None:
            self.control = self.process.draw_control(n, self.generator)
        else:
            self.control = self.process.check_control(control, n)
        self.prior_loc = self._prior_loc()
        return self.observation()

    @torch.no_grad()
    def step(self, action: NDArray[np.float32]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Advance; returns reward [B], kl [B] and the samples [B, *D] where episodes ended."""
        drift = self.control_scale * torch.as_tensor(action, device=self.x.device).float()
        scale = self.process.kernel.scale[self.step_index].expand(self.num_envs)
        loc = self.prior_loc + gaussian.expand_to(scale, drift) * drift
        self.x = gaussian.draw(loc, scale, self.generator)
        self.step_index += 1
        self.prior_loc = self._prior_loc()
        kl = drift.flatten(1).square().sum(1) / 2
        if self.step_index < self.process.num_steps:
            return -kl, kl, None
        sample = self.process.prior.decode(self.prior_loc)
        return self.process.reward(sample, self.control) - kl, kl, sample

    def observation(self) -> Observation:
        """Copies: editing an observation does not edit the state."""
        step = np.full(self.num_envs, self.step_index, dtype=np.int64)
        values = {f"control_{name}": _copy(value) for name, value in self.control.items()}
        return {"x": _copy(self.x), "step": step, **values}

    def _prior_loc(self) -> Tensor:
        step = torch.full((self.num_envs,), self.step_index, device=self.x.device)
        return self.process.prior_loc(self.x, step, self.control)


def _copy(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy(force=True).copy()


def _info(kl: Tensor, sample: Tensor | None) -> dict[str, NDArray[Any]]:
    return {"kl": _copy(kl)} | ({} if sample is None else {"sample": _copy(sample)})


def _first(batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: value[0] for name, value in batch.items()}


def _first_observation(batch: Observation) -> Observation:
    """Numbers as arrays without dimensions, as their spaces require."""
    numbers = {k: np.asarray(v) for k, v in _first(batch).items() if isinstance(v, np.floating)}
    return _first(batch) | numbers


class ControlEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Denoising as a Gymnasium environment.

    ## Description
    Steer a pretrained diffusion model by a drift towards samples that meet the condition.

    ## Action Space
    `Box(-1, 1, S, float32)`, times `control_scale`: drift in standard deviations of the step.

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
    overrides of the task's config.

    ## Vectorized environment
    `gymnasium.make_vec` gives a `ControlVectorEnv`: one network call for all episodes.

    ## Version History
    v0: first version.

    Args:
        process: the MDP.
        control_scale: largest drift per dimension, in standard deviations of the step.
    """

    metadata = {"render_modes": []}

    def __init__(self, process: DenoisingProcess, *, control_scale: float = 1.0) -> None:
        self._dynamics = _ControlDynamics(process, num_envs=1, control_scale=control_scale)
        self.process = process
        self.observation_space = self._dynamics.observation_space
        self.action_space = self._dynamics.action_space
        self.render_mode = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `options={"control": {name: label}}` fixes the condition."""
        first = self._np_random is None
        super().reset(seed=seed)
        if seed is not None or first:
            self._dynamics.generator.manual_seed(int(self.np_random.integers(2**63)))
        return _first_observation(self._dynamics.reset((options or {}).get("control"))), {}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by one denoising step."""
        reward, kl, sample = self._dynamics.step(np.asarray(action)[None])
        observation = _first_observation(self._dynamics.observation())
        info = _first(_info(kl, sample))
        return observation, float(reward[0]), sample is not None, False, info


class ControlVectorEnv(VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):
    """B control envs in one: every step is one batched call of the prior's network.

    Episodes have equal lengths and stay in step. Autoreset is Gymnasium's `NEXT_STEP`: the call
    after the last step ignores its actions and returns the first observations of new episodes.

    Args:
        process: the MDP.
        num_envs: B.
        control_scale: largest drift per dimension, in standard deviations of the step.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self, process: DenoisingProcess, *, num_envs: int, control_scale: float = 1.0
    ) -> None:
        self._dynamics = _ControlDynamics(process, num_envs=num_envs, control_scale=control_scale)
        self.process = process
        self.num_envs = num_envs
        self.single_observation_space = self._dynamics.observation_space
        self.single_action_space = self._dynamics.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = None
        self._ended = False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start B episodes; one generator draws for all, so only a single seed is taken."""
        if isinstance(seed, list):
            raise ConfigError("this vector env has one generator for all episodes; give one seed")
        first = self._np_random is None
        super().reset(seed=seed)
        if seed is not None or first:
            self._dynamics.generator.manual_seed(int(self.np_random.integers(2**63)))
        self._ended = False
        return self._dynamics.reset((options or {}).get("control")), {}

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Advance all episodes by one denoising step."""
        none = np.zeros(self.num_envs, dtype=bool)
        if self._ended:
            self._ended = False
            return self._dynamics.reset(None), np.zeros(self.num_envs), none, none.copy(), {}
        reward, kl, sample = self._dynamics.step(actions)
        self._ended = sample is not None
        ended = np.full(self.num_envs, self._ended)
        observation = self._dynamics.observation()
        rewards = reward.double().numpy(force=True)
        info = _info(kl, sample)
        present = {f"_{name}": ~none for name in info}  # Gymnasium's masks: every episode has it
        return observation, rewards, ended, none, info | present
