"""Training a network in updates, between which all state can be put aside."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# By kind of device: the random numbers that layers such as dropout draw.
_RANDOM = {
    "cpu": (lambda device: torch.get_rng_state(), lambda state, device: torch.set_rng_state(state)),
    "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
}


class Fitting(ABC):
    """The training of a network.

    Batches and noise come from `generator`, which is the CPU's for every device. What layers draw
    themselves depends on the seed too; torch's global random state stays untouched.

    Args:
        network: what is trained, on its device and in training mode.
        optimizer: of its parameters.
        seed: of all random numbers.
        total: number of updates.

    Attributes:
        done: number of finished updates.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, *, seed: int, total: int) -> None:
        self.network, self.optimizer, self.total, self.done = network, optimizer, total, 0
        self.device = next(network.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        self.layers = {
            device: torch.Generator(device).manual_seed(seed).get_state()
            for device in {torch.device("cpu"), self.device}
            if device.type in _RANDOM
        }

    @abstractmethod
    def update(self) -> float:
        """Change the network once; returns the loss."""

    def step(self) -> float:
        """Make one more update.

        Returns:
            Its loss.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        with self._layers_draw():
            loss = self.update()
        self.done += 1
        return loss

    def state(self) -> dict[str, Tensor]:
        """All that the updates to come depend on, by dotted names."""
        return {
            "done": torch.tensor(self.done),
            "generator": self.generator.get_state(),
            **{f"layers.{device.type}": state for device, state in self.layers.items()},
            **{f"network.{name}": value for name, value in self.network.state_dict().items()},
            **optimizer_state(self.optimizer),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave, bit for bit.

        Raises:
            KeyError, RuntimeError, ValueError: it is another network's.
        """
        self.done = int(state["done"])
        self.generator.set_state(state["generator"])
        self.layers = {device: state[f"layers.{device.type}"] for device in self.layers}
        self.network.load_state_dict(without_prefix(state, "network."))
        load_optimizer_state(self.optimizer, state)

    @contextmanager
    def _layers_draw(self) -> Iterator[None]:
        """Let layers draw their own random numbers instead of the global ones."""
        devices = [device for device in self.layers if device.type != "cpu"]
        with torch.random.fork_rng(devices=devices):
            for device, state in self.layers.items():
                _RANDOM[device.type][1](state, device)
            yield
            self.layers = {device: _RANDOM[device.type][0](device) for device in self.layers}


def optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimizer, as "optimizer.INDEX.NAME"."""
    return {
        f"optimizer.{index}.{name}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_state` gave, which may lie among other tensors.

    Raises:
        ValueError: it is of other parameters.
    """
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in without_prefix(state, "optimizer.").items():
        number, _, entry = name.partition(".")
        moments.setdefault(int(number), {})[entry] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in moments.items():
        shapes = {each.shape for each in entries.values() if each.ndim}
        if index >= len(parameters) or not shapes <= {parameters[index].shape}:
            raise ValueError("the optimizer's state is of other parameters")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    matching = {name: value for name, value in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in matching.items()}
