"""What text-to-image networks share: encoded prompts, guidance, the decoder, the size."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels.settings import CLASS, changed
from ctrl_rl.networks.execution import FixedPrecision
from ctrl_rl.priors.prior import NetworkDenoiser, Prior, Prompts


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Settings of a text-to-image prior.

    Attributes:
        prompts: the prior's prompts.
        negative_prompt: what guidance leads away from, and what "no prompt" means.
        guidance_scale: of classifier-free guidance; 1 for none, None for the pipeline's own.
        size: height and width of images, in pixels, > 0; None for the model's own.
        scheduler: settings in place of those of the pipeline's scheduler, or None.
    """

    prompts: Prompts
    negative_prompt: str
    guidance_scale: float | None
    size: Sequence[int] | None
    scheduler: Mapping[str, Any] | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts to encode, the negative prompt last."""
        return (*self.prompts.all, self.negative_prompt)

    def guidance(self, pipeline: Any) -> float:
        """The scale asked for, or else the default of the pipeline's call."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        call = inspect.signature(type(pipeline).__call__)
        return float(call.parameters["guidance_scale"].default)

    def scheduler_config(self, pipeline: Any) -> dict[str, Any]:
        """The config of the pipeline's scheduler, with the settings in its place."""
        own = {**pipeline.scheduler.config, CLASS: type(pipeline.scheduler).__name__}
        return changed(own, self.scheduler)


class GuidedNetwork(nn.Module, ABC):
    """A pipeline's network that takes a prompt's index and a ready control embedding.

    The texts were encoded once into a table, so no text encoder stays in memory. With
    classifier-free guidance (Ho, Salimans 2022, arXiv 2207.12598) the prediction is

        none + guidance_scale (asked - none),

    both in one call of twice the batch. The prior's law is then the guided one. The control
    embedding enters the asked half alone, so it is guided as the prompt is.

    Args:
        texts: [P + 1, L, D] encoded prompts; the last one is the negative prompt.
        added: by name, [P + 1, E] of the network's other inputs per prompt, or nothing.
        guidance_scale: 1 for no guidance.
    """

    part: str  # what the pipeline calls the network
    texts: Tensor

    def __init__(
        self, texts: Tensor, added: Mapping[str, Tensor], *, guidance_scale: float
    ) -> None:
        super().__init__()
        self.guidance_scale, self.added = guidance_scale, tuple(added)
        for name, table in {"texts": texts, **added}.items():
            self.register_buffer(name, table, persistent=False)

    @property
    @abstractmethod
    def embedding_features(self) -> int:
        """Width of the control embedding."""

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the stock pipeline's call for the same guidance."""
        return {"guidance_scale": self.guidance_scale}

    def stock_name(self, name: str) -> str:
        """A parameter's name in the stock network."""
        return name

    @contextmanager
    def stock(self) -> Iterator[Any]:
        """For a while, the network as diffusers has it, with nothing around its modules."""
        yield getattr(self, self.part)

    @abstractmethod
    def read_lora(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """A LoRA's weights by diffusers' names, as the stock pipeline reads a file.

        Returns:
            The weights, and alphas by name if they are among them, or None.
        """

    @abstractmethod
    def predict(
        self, x: Tensor, timestep: Tensor, embedding: Tensor, text: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        """Run the network without guidance.

        Args:
            x: [B, C, H, W] latents.
            timestep: [B].
            embedding: [B, E] control embedding, 0 for none.
            text: [B, L, D].
            added: by name, [B, E].
        """

    def forward(
        self, x: Tensor, timestep: Tensor, embedding: Tensor | None, prompt: Tensor
    ) -> Tensor:
        """Predict [B, C, H, W] from a latent of the same shape, and prompts [B] in 0 .. P."""
        nothing = x.new_zeros(len(x), self.embedding_features)
        asked = nothing if embedding is None else embedding.to(x.dtype).expand_as(nothing)
        if self.guidance_scale == 1:
            return self._predict(x, timestep, asked, prompt)
        none = torch.full_like(prompt, len(self.texts) - 1)
        both = self._predict(
            torch.cat([x, x]),
            torch.cat([timestep, timestep]),
            torch.cat([nothing, asked]),
            torch.cat([none, prompt]),
        )
        unguided, guided = both.chunk(2)
        return unguided + self.guidance_scale * (guided - unguided)

    def _predict(self, x: Tensor, timestep: Tensor, embedding: Tensor, prompt: Tensor) -> Tensor:
        added = {name: self.get_buffer(name)[prompt].to(x.dtype) for name in self.added}
        return self.predict(x, timestep, embedding, self.texts[prompt].to(x.dtype), added)


class LatentDecoder(FixedPrecision):
    """Latents to images by a diffusers autoencoder, one image at a time to save memory.

    Images are in [-1, 1] up to the decoder's overshoot: not clamped, as that stops gradients.

    Args:
        vae: an `AutoencoderKL`; its encoder is dropped.
    """

    vae: Any
    scale: Tensor
    shift: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None
        vae.enable_slicing()
        # In half precision SDXL's overflows, and the stock pipeline upcasts it as well.
        self.vae = vae.float() if vae.dtype == torch.float16 else vae
        config = vae.config
        channels = (1, config.latent_channels, 1, 1)
        mean = config.shift_factor or 0.0  # one for all channels, or one for each
        means = getattr(config, "latents_mean", None) or [mean] * config.latent_channels
        stds = getattr(config, "latents_std", None) or [1.0] * config.latent_channels
        self.register_buffer("scale", torch.tensor(stds).reshape(channels) / config.scaling_factor)
        self.register_buffer("shift", torch.tensor(means).reshape(channels))

    def forward(self, latent: Tensor) -> Tensor:
        """Decode [B, C, H, W] to [B, 3, 8 H, 8 W] float32 (the factor is the autoencoder's)."""
        latent = (latent * self.scale + self.shift).to(self.vae.dtype)
        image: Tensor = self.vae.decode(latent, return_dict=False)[0]
        return image.float()


def guided_prior(
    pipeline: Any,
    network: GuidedNetwork,
    config: Mapping[str, Any],
    shape: tuple[int, int, int],
    prompts: Prompts,
) -> Prior:
    """A pipeline's network with its decoder.

    Args:
        pipeline: gives the autoencoder.
        network: the pipeline's, wrapped.
        config: of its scheduler.
        shape: of one latent.
        prompts: the prior's prompts.
    """
    denoiser = NetworkDenoiser(network, config, embedding_features=network.embedding_features)
    return Prior(
        denoiser, config, shape=shape, decoder=LatentDecoder(pipeline.vae), prompts=prompts
    )


def encoded(pipeline: Any, settings: TextSettings, **given: Any) -> tuple[Tensor, ...]:
    """The prompts and, as the last row, the negative one, encoded as the stock pipeline does.

    Args:
        pipeline: one with classifier-free guidance, whose `encode_prompt` alternates between what
            guidance leads to and what it leads away from.
        settings: its texts are encoded.
        **given: more arguments of `encode_prompt`.

    Returns:
        Texts [P + 1, L, D] and, where the pipeline has them, pooled texts [P + 1, E].
    """
    encode = partial(
        pipeline.encode_prompt, device=torch.device("cpu"), num_images_per_prompt=1, **given
    )
    with torch.no_grad():
        # One by one: all of them at once could fill the memory.
        texts = settings.prompts.all
        rows = [encode(text, do_classifier_free_guidance=False)[::2] for text in texts]
        # No negative prompt is not always the empty one: SDXL's base model has zeros for it.
        both = encode(
            texts[0],
            do_classifier_free_guidance=True,
            negative_prompt=settings.negative_prompt or None,
        )
        rows.append(both[1::2])
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def latent_size(
    pipeline: Any, size: Sequence[int] | None, default: int | Sequence[int], patch: int = 1
) -> tuple[int, int]:
    """Height and width of a latent.

    Args:
        pipeline: gives the image pixels per latent pixel.
        size: height and width of the image, in pixels, > 0; None for the model's own.
        default: the model's own latent height and width, or one number for both.
        patch: latent pixels that the network takes together, along each side.

    Raises:
        ConfigError: sides that are not multiples of the model's unit.
    """
    if size is None:
        height, width = (default, default) if isinstance(default, int) else default
        return height, width
    unit = pipeline.vae_scale_factor * patch
    if any(side % unit for side in size):
        raise ConfigError(
            f"prior.size={list(size)} must be multiples of {unit} pixels with this model; null is "
            "the model's own size"
        )
    return size[0] // pipeline.vae_scale_factor, size[1] // pipeline.vae_scale_factor
