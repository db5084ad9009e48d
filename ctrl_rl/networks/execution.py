"""How networks are run: their precision, and what bounds their memory for the price of time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class FixedPrecision(nn.Module):
    """A module whose own tensors follow moves between devices but never change their dtype.

    `policy.bfloat16()` must not round the tables of a schedule; networks inside follow the cast.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse=False)
        return self


@dataclass
class Execution:
    """How the networks of one prior, its decoder, the reward and policies on it are run.

    One object that all of them share, copies of a network included, so that it is set in one place.

    Attributes:
        microbatch: most samples that a network is given at once; None for all. Larger batches go in
            parts, and with a graph their activations are recomputed part by part.
        checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    microbatch: int | None = None
    checkpointing: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Execution":
        """The same: a copy of a network runs as the network does."""
        return self


def in_parts(
    function: Callable[..., Tensor], *given: Tensor | None, rows: int | None, recompute: bool
) -> Tensor:
    """A function of the rows of tensors, on so many rows at a time.

    Args:
        function: of tensors with B rows, one result per row.
        *given: its arguments, [B, ...] or None.
        rows: at most so many at a time; None for all at once. With a graph, what is given a number
            here is recomputed in the backward pass, as all parts and all calls would fill the
            memory together otherwise.
        recompute: do so with all at once as well.

    Returns:
        What the function gives, [B, ...].
    """

    def run(*part: Tensor | None, recompute: bool) -> Tensor:
        if not (recompute and torch.is_grad_enabled()):
            return function(*part)
        output = checkpoint(function, *part, use_reentrant=False)
        assert isinstance(output, Tensor)
        return output

    first = next(tensor for tensor in given if tensor is not None)
    if rows is None or len(first) <= rows:
        return run(*given, recompute=recompute or rows is not None)
    number = -(-len(first) // rows)
    split = [[None] * number if each is None else each.split(rows) for each in given]
    return torch.cat([run(*part, recompute=True) for part in zip(*split, strict=True)])
