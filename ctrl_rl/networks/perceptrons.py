"""Small perceptrons that a policy adds to a prior."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl_rl.controls import Control
from ctrl_rl.gaussian import expand_to
from ctrl_rl.networks.embeddings import ControlEmbedding, table_of


class ConditionedPerceptron(nn.Module):
    """A perceptron f(x, k, y) that starts at 0, for vectors of up to a few thousand numbers.

    Args:
        inputs: size of x.
        outputs: size of the result.
        num_steps: K; steps enter as sines and cosines of k / K, and through their own table.
        controls: the task's controls by name.
        width: hidden width.
        depth: hidden layers.
    """

    _FREQUENCIES = 4  # octaves of k / K; the table below carries what they cannot resolve

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        num_steps: int,
        controls: Mapping[str, Control],
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.embedding = ControlEmbedding(controls, width)
        self.step_table = nn.Embedding(num_steps + 1, width)
        self.first = nn.Linear(inputs + 2 * self._FREQUENCIES, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs)
        for parameter in (self.step_table.weight, self.last.weight, self.last.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Evaluate at x [*N, inputs], steps [*N] in 0 .. K, values [*N] each: [*N, outputs]."""
        octaves = 2.0 ** torch.arange(self._FREQUENCIES, device=x.device)
        phase = math.pi * (step / self.num_steps)[..., None] * octaves
        features = torch.cat([x, phase.sin(), phase.cos()], dim=-1)
        hidden = self.first(features) + self.step_table(step) + self.embedding(control)
        hidden = nn.functional.silu(hidden)
        for layer in self.hidden:
            hidden = nn.functional.silu(layer(hidden))
        output: Tensor = self.last(hidden)
        return output


class ModulatedPerceptron(nn.Module):
    """A residual perceptron f(x, k, y) that starts at 0; steps and values scale its features.

    Step and values multiply and shift every layer's features (Perez et al., "FiLM", AAAI 2018,
    arXiv 1709.07871). So a label can turn a direction off, which a bias alone cannot. Features are
    normalised first (Ba et al. 2016, arXiv 1607.06450).

    Args:
        inputs: size of x.
        outputs: size of the result.
        num_steps: K; every step 0 .. K - 1 has its own modulations.
        controls: the task's controls by name.
        width: hidden width.
        depth: residual blocks.
    """

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        num_steps: int,
        controls: Mapping[str, Control],
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.modulation = Modulation(num_steps, controls, width)
        self.blocks = nn.ModuleList(
            _ModulatedBlock(num_steps, controls, width) for _ in range(depth)
        )
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, outputs)
        self.last_modulation = Modulation(num_steps, controls, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Evaluate at x [B, inputs], steps [B] in 0 .. K-1, values [B] each: [B, outputs]."""
        hidden = self.modulation(self.first(x), step, control)
        for block in self.blocks:
            hidden = block(hidden, step, control)
        hidden = self.last_modulation(self.norm(hidden), step, control)
        output: Tensor = self.last(nn.functional.silu(hidden))
        return output


class _ModulatedBlock(nn.Module):
    """A hidden layer on normalised, modulated features, added to them; 0 at the start."""

    def __init__(self, num_steps: int, controls: Mapping[str, Control], features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.first, self.last = (nn.Linear(features, features) for _ in range(2))
        self.modulation = Modulation(num_steps, controls, features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        hidden = self.modulation(self.first(self.norm(x)), step, control)
        output: Tensor = x + self.last(nn.functional.silu(hidden))
        return output


class Modulation(nn.Module):
    """Features [B, F, *S] times 1 + g, plus s; g and s [B, F] are sums of tables, 0 at the start.

    One table of steps, and two per control: one that all steps share, which learns what a value
    means at all of them, and one with rows for every step, for what it means there.
    """

    def __init__(self, num_steps: int, controls: Mapping[str, Control], features: int) -> None:
        super().__init__()
        self.steps = nn.Embedding(num_steps, 2 * features)
        self.labels = ControlEmbedding(controls, 2 * features)
        self.labels_by_step = nn.ModuleDict(
            {name: table_of(control, 2 * features, num_steps) for name, control in controls.items()}
        )
        nn.init.zeros_(self.steps.weight)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Modulate features [B, F, *S] at steps [B] in 0 .. K-1 and labels [B] each."""
        said = self.steps(step) + self.labels(control)
        for name, table in self.labels_by_step.items():
            said = said + table(control[name], step)
        scale, shift = (expand_to(part, x) for part in said.chunk(2, dim=-1))
        return x * (1 + scale) + shift
