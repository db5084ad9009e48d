"""The latent env: TorchRL, batched; the action is the next latent.

The policy owns the noise, so log pi is not a function of (s, a). The prior's mean is, and the env
emits it at every state. A state costs one call of the prior; policies that correct the prior read
the mean from the state.
"""

import secrets
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from ctrl_rl import controls, keys
from ctrl_rl.controls import Control
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError, check_sizes


def _spec(control: Control, num_envs: int) -> TensorSpec:
    """Labels and the null label, or numbers, unbounded as NaN is one of them."""
    if isinstance(control, controls.Categorical):
        return Categorical(control.size + 1, shape=(num_envs,), dtype=control.dtype)
    return Unbounded((num_envs,), dtype=control.dtype)


def fresh_seed() -> int:
    """A seed from the system's entropy: another one in every process."""
    return secrets.randbits(63)


class LatentEnv(EnvBase):  # type: ignore[misc]
    """Denoising as a TorchRL environment.

    Observation: `x` [B, *S], `step` [B], `(control, name)` [B], `prior_loc` [B, *S] and `sample`
    [B, *D], which is 0 until the episode ends. Action: `action` [B, *S], the next latent. Reward
    [B, 1] nats, 0 until the last step. Every episode has exactly K steps. Gradients flow from the
    reward to the actions where autograd is on.

    Args:
        process: the MDP.
        num_envs: B.
        seed: of the env's generator, which draws starts, conditions and the policy's noise; None
            takes a fresh one, so that copies of an env differ. `set_seed` takes the same.
        device: where everything runs.

    Raises:
        ConfigError: no episodes; a step without a state of `reset`, after the end, or with an
            action that does not fit `action_spec`; a reset of some episodes only.
    """

    def __init__(
        self,
        process: DenoisingProcess,
        *,
        num_envs: int = 64,
        seed: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        check_sizes("", num_envs=num_envs)
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.process = process.to(self.device)
        self.generator = torch.Generator(device=self.device)
        self._set_seed(seed)
        shape = (num_envs, *process.shape)
        control = {
            name: _spec(control, num_envs) for name, control in process.conditions.controls.items()
        }
        # Bounded, not Categorical: step K is a state too, though no action is taken there.
        step = Bounded(0, process.num_steps, shape=(num_envs,), dtype=torch.int64)
        self.observation_spec = Composite(
            {
                keys.X: Unbounded(shape),
                keys.STEP: step,
                keys.CONTROL: Composite(control, shape=(num_envs,)),
                keys.PRIOR_LOC: Unbounded(shape),
                keys.SAMPLE: Unbounded((num_envs, *process.sample_shape)),
            },
            shape=(num_envs,),
        )
        self.action_spec = Unbounded(shape)
        self.reward_spec = Unbounded((num_envs, 1))
        self.full_done_spec = Composite(
            {
                name: Categorical(2, shape=(num_envs, 1), dtype=torch.bool)
                for name in ("done", "terminated")
            },
            shape=(num_envs,),
        )

    def to(self, device: str | torch.device) -> "LatentEnv":
        """Move everything, the generator included.

        Its random numbers go on as they were on another device of the same kind. Between kinds
        their state does not fit, and the next one of them is the new generator's seed.
        """
        super().to(device)
        old = self.generator
        if old.device != self.device:
            self.generator = torch.Generator(device=self.device)
            if old.device.type == self.device.type:
                self.generator.set_state(old.get_state())
            else:
                draw = torch.randint(2**63 - 1, (), generator=old, device=old.device)
                self.generator.manual_seed(int(draw))
        return self

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(fresh_seed() if seed is None else seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        n = self.batch_size[0]
        if tensordict is not None and not tensordict.get("_reset", torch.ones(1)).all():
            raise ConfigError("the episodes of a latent env are in step; reset all of them at once")
        x = self.process.draw_start(n, self.generator)
        if tensordict is not None and keys.CONTROL in tensordict.keys():
            control = self.process.check_control(dict(tensordict[keys.CONTROL].items()), n)
        else:
            control = self.process.draw_control(n, self.generator)
        step = torch.zeros(n, dtype=torch.int64, device=self.device)
        return self._state(x, step, control, self._no_sample(n))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        x, control = self._action(tensordict), dict(_of_reset(tensordict, keys.CONTROL).items())
        step = _of_reset(tensordict, keys.STEP) + 1
        n = self.batch_size[0]
        last = self._is_last(step)
        state = self._state(x, step, control, self._no_sample(n))
        reward = x.new_zeros(n)
        if last:
            sample = self.process.prior.decode(state[keys.PRIOR_LOC])
            reward = self.process.reward(sample, control)
            state.set(keys.SAMPLE, sample)
        state.set(keys.REWARD, reward[:, None])
        ended = torch.full((n, 1), last, dtype=torch.bool, device=self.device)
        state.set("done", ended)
        state.set("terminated", ended.clone())
        return state

    def _action(self, tensordict: TensorDictBase) -> Tensor:
        """The action, refused unless it has the shape and type of the spec."""
        action, spec = tensordict.get(keys.ACTION, None), self.action_spec
        if action is None:
            raise ConfigError(f"step() needs an action; set '{keys.ACTION}' in the state")
        if action.shape != spec.shape or action.dtype != spec.dtype:
            raise ConfigError(
                f"the action has shape {tuple(action.shape)} and type {action.dtype}; give "
                f"{tuple(spec.shape)}, {spec.dtype}, the next latents"
            )
        return action

    def _is_last(self, step: Tensor) -> bool:
        """Whether steps [B], those after the action, are the last; all must be the same."""
        first, most = torch.stack(step.aminmax()).tolist()
        last = self.process.num_steps
        if first != most:
            raise ConfigError(
                f"the episodes of a latent env are in step, and this state has steps {first - 1} "
                f"to {most - 1}; step states of one step"
            )
        if not 0 < first <= last:
            raise ConfigError(f"no action is taken at step {first - 1} of {last}; call reset()")
        return bool(first == last)

    def _state(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], sample: Tensor
    ) -> TensorDict:
        return TensorDict(
            {
                keys.X: x,
                keys.STEP: step,
                keys.CONTROL: TensorDict(dict(control), batch_size=self.batch_size),
                keys.PRIOR_LOC: self.process.prior_loc(x, step, control),
                keys.SAMPLE: sample,
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _no_sample(self, n: int) -> Tensor:
        shape = self.observation_spec[keys.SAMPLE].shape[1:]
        return torch.zeros(n, *shape, device=self.device)


def _of_reset(tensordict: TensorDictBase, key: str) -> Any:
    """A part of the state that `reset` gives, and every step after it."""
    value = tensordict.get(key, None)
    if value is None:
        raise ConfigError(
            f"step() needs '{key}' beside the action: call reset() and set the action in its state"
        )
    return value
