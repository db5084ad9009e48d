"""Text-conditional latent UNets of diffusers (Stable Diffusion 1.x and 2.x, SDXL) as priors."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.nets import FixedPrecision
from ctrl_rl.priors.prior import NetworkDenoiser, Prior, Prompts


class TextUNet(nn.Module):
    """A `UNet2DConditionModel` that takes a prompt's place and a ready control embedding.

    The texts were encoded once and stand in a table, so no text encoder stays in memory. With
    classifier-free guidance (Ho, Salimans 2022, arXiv 2207.12598) the prediction is

        none + guidance_scale (asked - none),

    both in one call of twice the batch. The prior's law is then the guided one. The control
    embedding enters the asked half alone, so that what it says is guided as the prompt is.

    Args:
        unet: the network; `class_embedding = Identity` makes the stock model accept a vector
            through `class_labels`, added to its time embedding.
        texts: [P + 1, L, D] encoded prompts; the last one is the negative prompt.
        added: by name, [P + 1, E] of what else the network takes per prompt (SDXL), or nothing.
        guidance_scale: 1 for no guidance.
    """

    texts: Tensor
    unet: Any

    def __init__(
        self, unet: Any, texts: Tensor, added: Mapping[str, Tensor], *, guidance_scale: float
    ) -> None:
        super().__init__()
        unet.class_embedding = nn.Identity()
        self.unet, self.guidance_scale, self.added = unet, guidance_scale, tuple(added)
        for name, table in {"texts": texts, **added}.items():
            self.register_buffer(name, table, persistent=False)

    @property
    def embedding_features(self) -> int:
        """Width of the time embedding."""
        return int(self.unet.time_embedding.linear_2.out_features)

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
        output: Tensor = self.unet(
            x,
            timestep,
            encoder_hidden_states=self.texts[prompt].to(x.dtype),
            class_labels=embedding,
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return output


class LatentDecoder(FixedPrecision):
    """Latents to images by a diffusers autoencoder, one image at a time to save memory.

    Images are in [-1, 1] but for what the decoder overshoots: not clamped, as that stops gradients.

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
        std = getattr(config, "latents_std", None) or [1.0] * config.latent_channels
        mean = getattr(config, "latents_mean", None) or [0.0] * config.latent_channels
        self.register_buffer("scale", torch.tensor(std).reshape(channels) / config.scaling_factor)
        self.register_buffer("shift", torch.tensor(mean).reshape(channels))

    def forward(self, latent: Tensor) -> Tensor:
        """Decode [B, C, H, W] to [B, 3, 8 H, 8 W] float32 (the factor is the autoencoder's)."""
        latent = (latent * self.scale + self.shift).to(self.vae.dtype)
        image: Tensor = self.vae.decode(latent, return_dict=False)[0]
        return image.float()


def text_unet_prior(
    pipeline: Any,
    *,
    prompts: Prompts,
    negative_prompt: str,
    guidance_scale: float,
) -> Prior:
    """A prior from a loaded `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.

    Args:
        pipeline: its text encoders are used here and not kept.
        prompts: the prior's conditions.
        negative_prompt: what guidance leads away from, and what "no prompt" means.
        guidance_scale: of classifier-free guidance; 1 for none.

    Raises:
        ConfigError: the UNet has class labels already, or other input than output channels.
    """
    unet = pipeline.unet
    if unet.class_embedding is not None or unet.config.in_channels != unet.config.out_channels:
        raise ConfigError(
            f"prior.path holds a {type(pipeline).__name__} whose UNet takes class labels or more "
            "channels than it predicts (inpainting, edits); give a text-to-image model"
        )
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    texts, added = _encode(pipeline, prompts, negative_prompt, (height, width))
    network = TextUNet(unet, texts, added, guidance_scale=guidance_scale)
    # Schedulers of latent models leave it out or say False; the kernels' default is for pixels.
    config = {"clip_sample": False, **pipeline.scheduler.config}
    denoiser = NetworkDenoiser(network, config, embedding_features=network.embedding_features)
    return Prior(
        denoiser,
        config,
        shape=(unet.config.in_channels, height, width),
        decoder=LatentDecoder(pipeline.vae),
        prompts=prompts,
    )


def _encode(
    pipeline: Any, prompts: Prompts, negative_prompt: str, size: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The prompts and, as the last row, the negative one, encoded as the stock pipeline does."""
    _warn_of_long(pipeline.tokenizer, (*prompts.all, negative_prompt))
    encode = partial(pipeline.encode_prompt, device=torch.device("cpu"), num_images_per_prompt=1)
    with torch.no_grad():
        # One by one: all of them at once could fill the memory.
        rows = [encode(text, do_classifier_free_guidance=False)[::2] for text in prompts.all]
        # No negative prompt is not always the empty one: SDXL's base model has zeros for it.
        both = encode(
            prompts.all[0],
            do_classifier_free_guidance=True,
            negative_prompt=negative_prompt or None,
        )
        rows.append(both[1::2])
    texts, *pooled = (torch.cat(parts) for parts in zip(*rows, strict=True))
    if not pooled:
        return texts, {}
    # Size asked for, corner of the crop, size of the picture, in pixels (Podell et al., "SDXL",
    # arXiv 2307.01952, sec. 2.2): the model's own size and no crop, as the stock pipeline has it.
    height, width = (pipeline.vae_scale_factor * side for side in size)
    time_ids = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(texts), -1)
    return texts, {"text_embeds": pooled[0], "time_ids": time_ids.to(texts.dtype)}


def _warn_of_long(tokenizer: Any, texts: Sequence[str]) -> None:
    limit = tokenizer.model_max_length
    for text in texts:
        tokens = len(tokenizer(text, truncation=False, verbose=False).input_ids)
        if tokens > limit:
            warnings.warn(
                f"the prompt '{text[:40]}…' has {tokens} tokens, and the text encoder reads the "
                f"first {limit} of them",
                stacklevel=4,
            )
