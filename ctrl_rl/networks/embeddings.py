"""How networks read controls: zero-initialised tables of labels and functions of numbers.

A single table gives exactly 0 for null values: asking for nothing changes nothing.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl_rl.controls import Categorical, Continuous, Control


class NumberFeatures(nn.Module):
    """F features of numbers [*N]: 1, u, and sines and cosines of u, with u in [-1, 1]; NaN gives 0.

    Args:
        control: the interval, which u spans.
    """

    _OCTAVES = 4  # the slowest wave has half a period on the interval, the fastest four
    COUNT = 2 + 2 * _OCTAVES

    def __init__(self, control: Continuous) -> None:
        super().__init__()
        self.centre = (control.low + control.high) / 2
        self.half_width = (control.high - control.low) / 2

    def forward(self, values: Tensor) -> Tensor:
        """Features [*N, F] of numbers [*N]."""
        asked = ~values.isnan()
        u = (torch.where(asked, values, self.centre) - self.centre) / self.half_width
        octaves = 2.0 ** torch.arange(self._OCTAVES, device=values.device)
        phase = math.pi / 2 * u[..., None] * octaves
        features = torch.cat(
            [torch.ones_like(u)[..., None], u[..., None], phase.sin(), phase.cos()], -1
        )
        return features * asked[..., None]


class LabelTable(nn.Embedding):
    """Rows [*N, E] by label, and by table if it holds many tables; 0 at the start.

    Args:
        control: the labels; the null label has a row too.
        features: E.
        tables: number of tables.
    """

    def __init__(self, control: Categorical, features: int, tables: int | None = None) -> None:
        rows = control.size + 1
        null = control.null if tables is None else None
        super().__init__(rows * (tables or 1), features, padding_idx=null)
        self.rows = rows
        nn.init.zeros_(self.weight)

    def forward(self, label: Tensor, table: Tensor | None = None) -> Tensor:
        """Look up labels [*N], in tables [*N] if there are many."""
        return super().forward(label if table is None else table * self.rows + label)


class NumberTable(nn.Module):
    """Functions [*N, E] of a number, linear in `NumberFeatures`; 0 at the start and for NaN.

    Args:
        control: the interval.
        features: E.
        tables: number of functions, each with its own weights; None for one.
    """

    def __init__(self, control: Continuous, features: int, tables: int | None = None) -> None:
        super().__init__()
        self.read = NumberFeatures(control)
        self.weight = nn.Parameter(torch.zeros(tables or 1, self.read.COUNT, features))

    def forward(self, value: Tensor, table: Tensor | None = None) -> Tensor:
        """Evaluate at numbers [*N], by functions [*N] if there are many."""
        if table is None:
            return self.read(value) @ self.weight[0]
        return torch.einsum("...f,...fe->...e", self.read(value), self.weight[table])


_TABLES = {Categorical: LabelTable, Continuous: NumberTable}


def table_of(control: Control, features: int, tables: int | None = None) -> nn.Module:
    """The table for a kind of control: `LabelTable` or `NumberTable`."""
    return _TABLES[type(control)](control, features, tables)


class ControlEmbedding(nn.Module):
    """Sum of one zero-initialised table per named control.

    Additive: the number of rows is the sum of the numbers of labels, not their product (one row per
    combination would grow exponentially with the controls); 0 without any control. A null value
    gives 0 and stays there, as it gets no gradient.

    Args:
        controls: the task's controls by name.
        features: width E of the embedding.
    """

    nothing: Tensor

    def __init__(self, controls: Mapping[str, Control], features: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {name: table_of(control, features) for name, control in controls.items()}
        )
        self.register_buffer("nothing", torch.zeros(1, features), persistent=False)

    def forward(self, control: Mapping[str, Tensor]) -> Tensor:
        """Embed values, each [B], as [B, E], or [1, E] without any control."""
        rows: list[Tensor] = [table(control[name]) for name, table in self.tables.items()]
        return sum(rows, self.nothing)
