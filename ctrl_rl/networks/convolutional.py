"""Small networks for latents that are images: a drift, and values of all conditions."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl_rl.controls import Control
from ctrl_rl.networks.perceptrons import ModulatedPerceptron, Modulation


class ModulatedImageNetwork(nn.Module):
    """A network f(x, k, y) on images that starts at 0: a perceptron drafts, convolutions finish.

    A `ModulatedPerceptron` sees the whole image at once, at 16x16 pixels at most, and so knows
    whether, where and what to draw. Residual blocks of 3x3 convolutions see the image and the
    draft at full size, squares of 2x2 pixels as one position (the space-to-depth of Shi et al.
    2016, arXiv 1609.05158, inverted), and add local detail. Steps and labels scale and shift the
    features everywhere (FiLM, Perez et al. 2018).

    Args:
        shape: [C, H, W] of x, of any size.
        outputs: channels of the result.
        num_steps: K; every step 0 .. K - 1 has its own modulations.
        controls: the task's controls by name.
        width: hidden width of the perceptron.
        depth: its residual blocks.
        channels: of the convolutions.
        blocks: residual blocks of two convolutions; 0 for the perceptron alone.
    """

    _COARSE = 16  # largest side that the perceptron sees, in pixels: 1,536 numbers of RGB twice
    _SQUARE = 2  # pixels a side that become one position

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        outputs: int,
        num_steps: int,
        controls: Mapping[str, Control],
        width: int,
        depth: int,
        channels: int,
        blocks: int,
    ) -> None:
        super().__init__()
        incoming, *self.sides = shape
        self.coarse = [min(side, self._COARSE) for side in self.sides]
        self.draft = ModulatedPerceptron(
            inputs=incoming * math.prod(self.coarse),
            outputs=outputs * math.prod(self.coarse),
            num_steps=num_steps,
            controls=controls,
            width=width,
            depth=depth,
        )
        self.blocks = nn.ModuleList(
            _ModulatedBlock(num_steps, controls, channels) for _ in range(blocks)
        )
        if not blocks:
            return
        self.padding = [-side % self._SQUARE for side in self.sides]
        area = self._SQUARE**2
        self.first = nn.Conv2d(area * (incoming + outputs), channels, 3, padding=1)
        self.norm, self.last = nn.GroupNorm(1, channels), nn.Conv2d(channels, area * outputs, 1)
        self.modulation = Modulation(num_steps, controls, channels)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Evaluate at x [B, C, H, W], steps [B] in 0 .. K-1, labels [B]: [B, outputs, H, W]."""
        height, width = self.sides
        seen, smaller = x, self.coarse != self.sides
        if smaller:
            seen = nn.functional.adaptive_avg_pool2d(x, (self.coarse[0], self.coarse[1]))
        draft = self.draft(seen.flatten(1), step, control).unflatten(1, (-1, *self.coarse))
        if smaller:
            draft = nn.functional.interpolate(draft, (height, width))
        if not self.blocks:
            return draft
        given = torch.cat([x, draft], dim=1)
        given = nn.functional.pad(given, (0, self.padding[1], 0, self.padding[0]))
        hidden = self.first(nn.functional.pixel_unshuffle(given, self._SQUARE))
        for block in self.blocks:
            hidden = block(hidden, step, control)
        hidden = nn.functional.silu(self.modulation(self.norm(hidden), step, control))
        finish = nn.functional.pixel_shuffle(self.last(hidden), self._SQUARE)
        return draft + finish[..., :height, :width]


class _ModulatedBlock(nn.Module):
    """Two convolutions on normalised, modulated features, added to them; 0 at the start."""

    def __init__(self, num_steps: int, controls: Mapping[str, Control], channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.first, self.last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.modulation = Modulation(num_steps, controls, channels)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, step: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        hidden = self.modulation(self.first(self.norm(x)), step, control)
        output: Tensor = x + self.last(nn.functional.silu(hidden))
        return output


class StepwiseEncoder(nn.Module):
    """A small convolutional network f(x, k) that starts at 0, for images of 4 to 64 pixels a side.

    A residual block that sees the step works on the whole image. Strided convolutions halve it
    until a side has at most 4 pixels; more such blocks follow, and a perceptron on all positions.

    Args:
        shape: [C, H, W] of x.
        outputs: size of the result.
        num_steps: K; every step has a learned embedding.
        channels: on the whole image, a multiple of 4; after the first halving twice as many.
        width: of the step's embedding and of the last hidden layer.
        depth: residual blocks after the halvings.
    """

    _SIDE, _GROUPS = 4, 4  # pixels that the blocks work on; groups of their normalisation

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        outputs: int,
        num_steps: int,
        channels: int,
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        incoming, *sides = shape
        self.step_table = nn.Embedding(num_steps + 1, width)
        self.first = nn.Conv2d(incoming, channels, 3, padding=1)
        self.whole = _ResidualBlock(channels, width, self._GROUPS)
        incoming, channels = channels, 2 * channels
        self.halvings = nn.ModuleList()
        while not self.halvings or min(sides) > self._SIDE:
            self.halvings.append(nn.Conv2d(incoming, channels, 3, stride=2, padding=1))
            incoming, sides = channels, [-(-side // 2) for side in sides]
        self.blocks = nn.ModuleList(
            _ResidualBlock(channels, width, self._GROUPS) for _ in range(depth)
        )
        self.hidden = nn.Linear(channels * math.prod(sides), width)
        self.last = nn.Linear(width, outputs)
        for parameter in (self.last.weight, self.last.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """Evaluate at x [B, C, H, W] and steps [B] in 0 .. K: [B, outputs]."""
        embedded = self.step_table(step)
        x = self.whole(self.first(x), embedded)
        for halving in self.halvings:
            x = halving(x)
        for block in self.blocks:
            x = block(x, embedded)
        hidden = self.hidden(nn.functional.silu(x).flatten(1)) + embedded
        output: Tensor = self.last(nn.functional.silu(hidden))
        return output


class _ResidualBlock(nn.Module):
    """Two normalised convolutions around a step's bias, 0 at the start."""

    def __init__(self, channels: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(2))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)
        )
        self.bias = nn.Linear(embedding, channels)
        for parameter in self.convolutions[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        hidden = self.convolutions[0](nn.functional.silu(self.norms[0](x)))
        hidden = hidden + self.bias(nn.functional.silu(embedded))[:, :, None, None]
        hidden = self.convolutions[1](nn.functional.silu(self.norms[1](hidden)))
        return x + hidden
