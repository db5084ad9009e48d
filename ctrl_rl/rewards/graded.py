"""Classes of a quantity measured with an error."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from ctrl_rl.controls import check_label_names
from ctrl_rl.errors import ConfigError


class Measure(Protocol):
    """Anything that gives one number per sample, such as `Compressibility` or `AestheticScore`."""

    differentiable: bool

    def __call__(self, sample: Tensor) -> Tensor:
        """[B] of samples [B, *D]."""
        ...


class Graded(nn.Module):
    """Classes between edges of a measured quantity, with a normal error.

        p(y | x) = P( edge_y <= measure(x) + std * noise < edge_{y+1} ),

    so log-probabilities are finite everywhere and tell which way a class lies. The most
    probable label is the class itself, to within the error; as a held-out judge this is the oracle.

    Args:
        measure: gives the quantity.
        edges: between the classes, ascending, in the measure's unit; one more class than edges.
        std: of the error, > 0, in the same unit.
        label_names: names of the classes, in order, such as [small, large]; none if they are
            numbers.

    Raises:
        ConfigError: edges that do not ascend, a standard deviation of 0 or less, or names that do
            not tell the classes apart.
    """

    edges: Tensor

    def __init__(
        self,
        *,
        measure: Measure,
        edges: Sequence[float],
        std: float,
        label_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not edges or any(not low < high for low, high in pairwise(edges)):
            raise ConfigError(f"edges={list(edges)} must ascend, such as [-110, -85, -60]")
        if not std > 0:
            raise ConfigError(f"std={std} must be > 0")
        self.measure = measure
        self.differentiable = measure.differentiable
        self.num_labels, self.std = len(edges) + 1, float(std)
        check_label_names("label_names", label_names, self.num_labels)
        self.label_names = tuple(label_names)
        self.register_buffer("edges", torch.tensor([float(edge) for edge in edges]))

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, L] of samples [B, *D], in nats."""
        distance = (self.edges - self.measure(x)[:, None]) / self.std
        first, last = distance[:, :1], distance[:, -1:]
        # A class between two edges: a difference of two tails, on the side where both are small.
        exact = distance.cpu() if distance.device.type == "mps" else distance  # without float64
        low, high = exact[:, :-1].double(), exact[:, 1:].double()
        upper = low + high > 0
        below = torch.where(upper, -high, low), torch.where(upper, -low, high)
        tail, whole = (torch.special.log_ndtr(each) for each in below)
        between = whole + torch.log(-torch.expm1(tail - whole))
        parts = (torch.special.log_ndtr(first), between, torch.special.log_ndtr(-last))
        return torch.cat([part.float().to(distance.device) for part in parts], dim=1)
