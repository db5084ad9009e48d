"""How networks run: their precision, and what saves memory at the price of time."""

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
    """How the networks of one prior, its decoder, the reward and policies on it run.

    They all share one object, copies of a network included, so it is set in one place.

    Attributes:
        microbatch: most samples per call of a network; None for all. Larger batches go in
            parts, and with a graph their activations are recomputed part by part.
        checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    microbatch: int | None = None
    checkpointing: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Execution":
        """The same object: a copy of a network runs as the network does."""
        return self


def in_parts(
    function: Callable[..., Tensor], *given: Tensor | None, rows: int | None, recompute: bool
) -> Tensor:
    """Apply a function to the rows of tensors, `rows` at a time.

    Args:
        function: takes tensors with B rows, gives one result per row.
        *given: its arguments, [B, ...] or None.
        rows: most rows at a time; None for all at once. With a graph, a number here also recomputes
            activations in the backward pass, as those of all parts and all calls together would
            fill the memory.
        recompute: recompute with all rows at once as well.

    Returns:
        The function's results, [B, ...].
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
