"""Text-conditional flow-matching transformers of diffusers (Stable Diffusion 3, Flux) as priors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.priors.guided import (
    GuidedNetwork,
    LatentDecoder,
    default_guidance,
    encoded,
    latent_size,
    warn_of_long,
)
from ctrl_rl.priors.prior import NetworkDenoiser, Prior, Prompts
from ctrl_rl.schedules import FLOW, SHIFT, UNIFORM

POOLED = "pooled_projections"
_PATCH = 2  # of Flux, whose pipeline packs latents 2 x 2
_T5_TOKENS = {"sd3": 256, "flux": 512}  # what the pipelines' calls let T5 read, by default


class ControlledTimeEmbedding(nn.Module):
    """A transformer's `time_text_embed`, whose vector modulates all blocks, with a control added.

    The control comes behind the pooled text, so that the stock transformer passes it on; zeros
    leave every bit as it was.

    Args:
        stock: the transformer's own module.
    """

    stock: Any

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock = stock
        self.features = int(stock.timestep_embedder.linear_2.out_features)

    def forward(self, *given: Tensor) -> Tensor:
        """The modulation vector [B, E]; the last argument is [B, P + E]."""
        *others, pooled = given
        text, control = pooled[:, : -self.features], pooled[:, -self.features :]
        vector: Tensor = self.stock(*others, text) + control
        return vector


class TextTransformer(GuidedNetwork):
    """A `SD3Transformer2DModel`; the control embedding is added to the modulation vector.

    Args:
        transformer: the network.
        texts: see `GuidedNetwork`.
        added: the pooled texts.
        guidance_scale: 1 for no guidance.
    """

    part = "transformer"
    transformer: Any

    def __init__(
        self,
        transformer: Any,
        texts: Tensor,
        added: Mapping[str, Tensor],
        *,
        guidance_scale: float,
    ) -> None:
        super().__init__(texts, added, guidance_scale=guidance_scale)
        transformer.time_text_embed = ControlledTimeEmbedding(transformer.time_text_embed)
        self.transformer = transformer

    @property
    def embedding_features(self) -> int:
        """Width of the modulation vector."""
        return int(self.transformer.time_text_embed.features)

    def stock_name(self, name: str) -> str:
        """Without the module that was put around one of the network's."""
        return name.replace("time_text_embed.stock.", "time_text_embed.")

    def predict(
        self, x: Tensor, timestep: Tensor, embedding: Tensor, text: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer."""
        output: Tensor = self.transformer(
            x,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=torch.cat([added[POOLED], embedding], dim=1),
            return_dict=False,
        )[0]
        return output


class PackedTransformer(TextTransformer):
    """A `FluxTransformer2DModel`, which takes latents as a sequence of 2 x 2 patches.

    Args:
        transformer: the network.
        texts: see `GuidedNetwork`.
        added: the pooled texts.
        guidance_scale: of classifier-free guidance; 1 for none.
        embedded_guidance: what a guidance-distilled model is told; None for others.
    """

    def __init__(
        self,
        transformer: Any,
        texts: Tensor,
        added: Mapping[str, Tensor],
        *,
        guidance_scale: float,
        embedded_guidance: float | None,
    ) -> None:
        super().__init__(transformer, texts, added, guidance_scale=guidance_scale)
        self.embedded_guidance = embedded_guidance

    @property
    def call(self) -> dict[str, Any]:
        """Guidance of the one kind or the other, or none."""
        if self.embedded_guidance is not None:
            return {"guidance_scale": self.embedded_guidance}
        if self.guidance_scale == 1:
            return {}
        return {"true_cfg_scale": self.guidance_scale, "negative_prompt": ""}

    def predict(
        self, x: Tensor, timestep: Tensor, embedding: Tensor, text: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer on patches."""
        rows, columns = (side // _PATCH for side in x.shape[-2:])
        place = torch.zeros(rows, columns, 3, dtype=x.dtype, device=x.device)
        place[..., 1] += torch.arange(rows, device=x.device)[:, None]
        place[..., 2] += torch.arange(columns, device=x.device)
        told = self.embedded_guidance
        output: Tensor = self.transformer(
            packed(x),
            timestep=timestep / 1000,  # which the network multiplies by 1000
            guidance=None if told is None else torch.full((len(x),), told, device=x.device),
            encoder_hidden_states=text,
            pooled_projections=torch.cat([added[POOLED], embedding], dim=1),
            txt_ids=place.new_zeros(text.shape[1], 3),
            img_ids=place.flatten(0, 1),
            return_dict=False,
        )[0]
        return _unpacked(output, rows)


def packed(latent: Tensor) -> Tensor:
    """Latents [B, C, H, W] as sequences of 2 x 2 patches [B, H W / 4, 4 C]."""
    patches = latent.unflatten(3, (-1, _PATCH)).unflatten(2, (-1, _PATCH))  # [B, C, h, 2, w, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(sequence: Tensor, rows: int) -> Tensor:
    patches = sequence.unflatten(2, (-1, _PATCH, _PATCH)).unflatten(1, (rows, -1))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def sd3_prior(
    pipeline: Any,
    *,
    prompts: Prompts,
    negative_prompt: str,
    guidance_scale: float | None,
    size: Sequence[int] | None,
) -> Prior:
    """A prior from a loaded `StableDiffusion3Pipeline`; arguments as of `text_unet_prior`.

    Raises:
        ConfigError: images larger than the model has positions for.
    """
    transformer = pipeline.transformer
    patch = transformer.config.patch_size
    height, width = latent_size(pipeline, size, transformer.config.sample_size, patch)
    most = transformer.config.pos_embed_max_size * patch * pipeline.vae_scale_factor
    if size is not None and max(size) > most:
        raise ConfigError(f"prior.size={list(size)}: this model draws at most {most} pixels a side")
    told = (*prompts.all, negative_prompt)
    if pipeline.tokenizer_3 is None:
        warn_of_long(pipeline.tokenizer, told)
    else:
        warn_of_long(pipeline.tokenizer_3, told, _T5_TOKENS["sd3"])
    texts, pooled = encoded(pipeline, prompts, negative_prompt, prompt_2=None, prompt_3=None)
    if guidance_scale is None:
        guidance_scale = default_guidance(pipeline)
    network = TextTransformer(transformer, texts, {POOLED: pooled}, guidance_scale=guidance_scale)
    config = _flow_config(pipeline.scheduler.config, (height // patch) * (width // patch))
    return _prior(
        pipeline, network, config, (transformer.config.in_channels, height, width), prompts
    )


def flux_prior(
    pipeline: Any,
    *,
    prompts: Prompts,
    negative_prompt: str,
    guidance_scale: float | None,
    size: Sequence[int] | None,
) -> Prior:
    """A prior from a loaded `FluxPipeline`; arguments as of `text_unet_prior`.

    A guidance-distilled model is told the guidance scale and needs no second call; others have
    none where the scale is None.

    Raises:
        ConfigError: a negative prompt for a guidance-distilled model, or without guidance.
    """
    transformer = pipeline.transformer
    distilled = bool(transformer.config.guidance_embeds)
    if distilled and negative_prompt:
        raise ConfigError(
            f"prior.negative_prompt='{negative_prompt}': this model is guidance-distilled and "
            "takes none; leave it out"
        )
    own = default_guidance(pipeline) if distilled else 1.0
    scale = own if guidance_scale is None else guidance_scale
    if scale == 1 and negative_prompt:
        raise ConfigError(
            f"prior.negative_prompt='{negative_prompt}' does nothing without guidance, which this "
            "model has none of by itself; leave it out, or give prior.guidance_scale above 1"
        )
    height, width = latent_size(pipeline, size, pipeline.default_sample_size, _PATCH)
    told = (*prompts.all, negative_prompt)
    warn_of_long(pipeline.tokenizer_2, told, _T5_TOKENS["flux"])
    with torch.no_grad():
        rows = [pipeline.encode_prompt(text, device=torch.device("cpu"))[:2] for text in told]
    texts, pooled = (torch.cat(parts) for parts in zip(*rows, strict=True))
    network = PackedTransformer(
        transformer,
        texts,
        {POOLED: pooled},
        guidance_scale=1.0 if distilled else scale,
        embedded_guidance=scale if distilled else None,
    )
    tokens = (height // _PATCH) * (width // _PATCH)
    config = _flow_config(pipeline.scheduler.config, tokens) | {UNIFORM: True}
    channels = transformer.config.in_channels // _PATCH**2
    return _prior(pipeline, network, config, (channels, height, width), prompts)


def _flow_config(config: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The scheduler's config, with the shift that its pipeline computes for so many patches."""
    given = {**config, "prediction_type": FLOW}
    if config.get("use_dynamic_shifting"):
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (many - few)
        given[SHIFT] = config["base_shift"] + slope * (tokens - few)
    return given


def _prior(
    pipeline: Any,
    network: TextTransformer,
    config: dict[str, Any],
    shape: tuple[int, int, int],
    prompts: Prompts,
) -> Prior:
    denoiser = NetworkDenoiser(network, config, embedding_features=network.embedding_features)
    return Prior(
        denoiser, config, shape=shape, decoder=LatentDecoder(pipeline.vae), prompts=prompts
    )
