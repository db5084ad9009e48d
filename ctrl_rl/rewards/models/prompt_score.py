"""How well an image fits its own prompt, as a reward: CLIP score, PickScore, HPS, ImageReward."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from hydra.utils import get_class
from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.assets import unreachable
from ctrl_rl.errors import ConfigError, import_hint
from ctrl_rl.pixels import check_images
from ctrl_rl.rewards.models.loading import source
from ctrl_rl.rewards.reward import Reward


class PromptScore(Protocol):
    """Anything that scores images for prompts, such as `ClipScore`."""

    differentiable: bool
    upper_bound: float | None

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Take all prompts, in the order of their indices."""
        ...

    def __call__(self, sample: Tensor, prompt: Tensor) -> Tensor:
        """[B] of samples [B, *D] and prompts [B] int64, indices into those read."""
        ...


class PromptReward(Reward):
    """weight * score(sample, prompt), with the prompt that the prior drew the sample for.

    It has no control: it teaches the same for all labels. `WeightedSum` combines it with rewards
    that have some.

    Args:
        score: of images for prompts.
        weight: nats per unit of the score, > 0.

    Raises:
        ConfigError: a weight of 0 or less.
    """

    reads_prompts = True

    def __init__(self, *, score: PromptScore, weight: float = 1.0) -> None:
        super().__init__()
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"weight={weight} must be > 0")
        self.score, self.weight = score, float(weight)
        self.requires_grad_(False).eval()
        self.controls = {}
        self.differentiable = score.differentiable
        # A missing prompt is worth 0, which must not exceed the bound either.
        bound = score.upper_bound
        self.upper_bound = None if bound is None else max(weight * bound, 0.0)
        self.prompts: tuple[str, ...] = ()

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Pass the prompts to the score, once.

        Raises:
            ConfigError: others were read before; their indices would change meaning.
        """
        given = tuple(prompts)
        if self.prompts and self.prompts != given:
            raise ConfigError("the reward has read another prior's prompts; make one for each")
        if not self.prompts:
            self.score.read_prompts(given)
        self.prompts = given

    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Score every sample for its prompt; a missing prompt asks for nothing."""
        place = control[keys.PROMPT]
        number = len(self.prompts)
        score = self.score(sample, place.clamp(max=number - 1))
        return torch.where(place < number, self.weight * score.float(), 0.0)


class PackagedScore(nn.Module):
    """A scorer of another package as a `PromptScore`.

    The class has `from_pretrained(path)`, and its objects `score(pixels, prompts)`: pixels
    [B, 3, H, W] in [0, 1], B texts, and [B] or [B, 1] scores back.

    Args:
        target: the class, or its dotted name, such as package.module.Scorer.
        path: the model's folder, or its id on the hub.
        differentiable: whether its scores have a gradient.
        upper_bound: upper bound of the scores, or None; None makes the gap an estimate.

    Raises:
        ConfigError: no such package, class or model.
    """

    def __init__(
        self,
        *,
        target: str | Callable[..., Any],
        path: str,
        differentiable: bool = True,
        upper_bound: float | None = None,
    ) -> None:
        super().__init__()
        try:
            kind: Any = get_class(target) if isinstance(target, str) else target
        except Exception as error:  # importing a package may raise anything
            raise ConfigError(
                f"target={target} cannot be imported: {import_hint(str(target), error)}; install "
                "its package, or give the dotted name of a class with from_pretrained and score"
            ) from error
        for needed in ("from_pretrained", "score"):
            if not callable(getattr(kind, needed, None)):
                raise ConfigError(f"target={target} has no method {needed}")
        try:
            self.model = kind.from_pretrained(source(path))
        except Exception as error:  # from the hub's client, the package, the file system
            raise unreachable("path", path, "a model's folder", error) from error
        self.differentiable, self.upper_bound = differentiable, upper_bound
        self.prompts: tuple[str, ...] = ()

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Keep the texts."""
        self.prompts = tuple(prompts)

    def forward(self, sample: Tensor, prompt: Tensor) -> Tensor:
        """Scores [B] of images [B, C, H, W] for prompts [B], indices into those read."""
        check_images(sample.shape[1:], "a score of images for prompts")
        pixels = (sample.float() / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        texts = [self.prompts[place] for place in prompt.tolist()]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            score = torch.as_tensor(self.model.score(pixels, texts), device=sample.device)
        if score.numel() != len(sample):
            raise ConfigError(
                f"{type(self.model).__name__}.score gave shape {tuple(score.shape)} for "
                f"{len(sample)} samples; it must give one number for each"
            )
        return score.reshape(len(sample))
