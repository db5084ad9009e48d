"""What the latent env is given: actions, states, seeds and devices."""

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv

from ctrl_rl.envs import latent
from ctrl_rl.envs.latent import LatentEnv, fresh_seed
from ctrl_rl.errors import ConfigError
from ctrl_rl.runs.loaded import make_env, make_process

SHORT = ["kernel.num_steps=4"]
make = partial(make_env, "mixture2d", num_envs=3, overrides=SHORT)


@pytest.mark.parametrize(
    "action",
    [
        torch.zeros(3, 1),
        torch.zeros(3, 1, 2),
        torch.zeros(3, 2, dtype=torch.float64),
        torch.zeros(3, 2, dtype=torch.int64),
    ],
)
def test_action_of_another_shape_or_type_is_refused(action: Tensor) -> None:
    env = make(seed=0)
    state = env.reset()
    with pytest.raises(ConfigError, match=r"the action has .*give \(3, 2\), torch.float32"):
        env.step(state.set("action", action))


def test_state_of_several_steps_is_refused() -> None:
    env = make(seed=0)
    state = env.reset().set("action", torch.zeros(3, 2))
    state["step"] = torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match="in step, and this state has steps 0 to 2"):
        env.step(state)


def test_process_tells_the_read_out_by_every_row() -> None:
    process = make_process("mixture2d", SHORT)
    x, step = torch.randn(3, 2), torch.tensor([4, 3, 3])
    for asked in (process.prior_loc, process.clean_estimate):
        for order in ([0, 1, 2], [1, 2, 0]):
            with pytest.raises(ConfigError, match="1 of 3 latents are at step 4, the read-out"):
                asked(x, step[order], {})
        both = asked(x, torch.tensor([3, 1, 0]), {})  # other steps may differ
        assert torch.equal(both[:1], asked(x[:1], step[1:2], {}))


def test_steps_out_of_order_say_what_to_do() -> None:
    env, action = make(seed=0), torch.zeros(3, 2)
    with pytest.raises(ConfigError, match=r"call reset\(\) and set the action in its state"):
        env.step(TensorDict({"action": action}, [3]))
    state = env.reset()
    with pytest.raises(ConfigError, match="needs an action; set 'action'"):
        env.step(state)
    for _ in range(4):
        state = env.step(state.set("action", action))["next"]
    with pytest.raises(ConfigError, match=r"no action is taken at step 4 of 4; call reset\(\)"):
        env.step(state.set("action", action))


def starts(env: Any) -> Tensor:
    x: Tensor = env.reset()["x"]
    return x


def test_copies_of_an_env_differ_unless_they_have_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "fresh_seed", fresh_seed)  # which tests hold still
    first, second = starts(SerialEnv(2, make))
    assert not torch.equal(first, second)
    assert not torch.equal(starts(make()), starts(make()))
    assert torch.equal(*starts(SerialEnv(2, partial(make, seed=5))))
    env = make(seed=5)
    env.set_seed(None)
    assert not torch.equal(starts(env), starts(make(seed=5)))


def test_workers_have_seeds_of_their_own_and_the_same_again() -> None:
    make = partial(LatentEnv, make_process("mixture2d", SHORT), num_envs=3)
    env = ParallelEnv(2, make, mp_start_method="fork")
    try:
        following = env.set_seed(3)
        first = starts(env).clone()
        assert env.set_seed(3) == following != 3
        assert torch.equal(starts(env), first)
        assert not torch.equal(*first)
        assert torch.equal(first[0], starts(make(seed=3)))
        assert torch.equal(first[1], starts(make(seed=make().set_seed(3))))
    finally:
        env.close()


class Elsewhere:
    """A generator of a device that this machine lacks."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.state = torch.device(device), 0

    def manual_seed(self, seed: int) -> None:
        self.state = seed

    def get_state(self) -> int:
        return self.state

    def set_state(self, state: int) -> None:
        self.state = state


def moved(env: Any, device: str) -> Any:
    env._device = torch.device(device)
    return env


def test_generator_moves_with_the_env(monkeypatch: pytest.MonkeyPatch) -> None:
    env, twin = make(seed=5), make(seed=5)
    generator = env.generator
    assert env.to("cpu").generator is generator
    monkeypatch.setattr(torch, "Generator", Elsewhere)
    monkeypatch.setattr(EnvBase, "to", moved)  # TorchRL cannot move a spec with bounds to "meta"
    assert env.to("meta:0") is env
    assert isinstance(env.generator, Elsewhere) and env.generator.device == torch.device("meta:0")
    seed = int(torch.randint(2**63 - 1, (), generator=twin.generator))
    assert env.generator.state == seed
    env.to("meta:1")  # another of the kind: the stream is where it was
    assert env.generator.device == torch.device("meta:1") and env.generator.state == seed
