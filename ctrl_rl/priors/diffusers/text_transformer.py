"""Text-conditional flow-matching transformers of diffusers (Stable Diffusion 3, Flux) as priors."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels.accepted import FLOW, SHIFT, UNIFORM
from ctrl_rl.kernels.flow import flow_scheduler
from ctrl_rl.kernels.settings import CLASS, scheduler_settings
from ctrl_rl.networks.texts import warn_of_long
from ctrl_rl.priors.diffusers.guided import (
    GuidedNetwork,
    TextSettings,
    encoded,
    guided_prior,
    latent_size,
)
from ctrl_rl.priors.prior import Prior

POOLED = "pooled_projections"
_PATCH = 2  # of Flux, whose pipeline packs latents 2 x 2
_T5_TOKENS = {"sd3": 256, "flux": 512}  # what the pipelines' calls let T5 read, by default


class ControlledTimeEmbedding(nn.Module):
    """A transformer's `time_text_embed`, whose vector modulates all blocks, with a control added.

    The control is appended to the pooled text, so the stock transformer passes it on; zeros change
    no bit.

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
        pooled: [P + 1, E] pooled texts.
        guidance_scale: 1 for no guidance.
    """

    part = "transformer"
    transformer: Any

    def __init__(
        self, transformer: Any, texts: Tensor, pooled: Tensor, *, guidance_scale: float
    ) -> None:
        super().__init__(texts, {POOLED: pooled}, guidance_scale=guidance_scale)
        transformer.time_text_embed = ControlledTimeEmbedding(transformer.time_text_embed)
        self.transformer = transformer

    @property
    def embedding_features(self) -> int:
        """Width of the modulation vector."""
        return int(self.transformer.time_text_embed.features)

    def stock_name(self, name: str) -> str:
        """Without the wrapper around one of the network's modules."""
        return name.replace("time_text_embed.stock.", "time_text_embed.")

    @contextmanager
    def stock(self) -> Iterator[Any]:
        """For a while, without the module that adds the control."""
        controlled = self.transformer.time_text_embed
        self.transformer.time_text_embed = controlled.stock
        try:
            yield self.transformer
        finally:
            self.transformer.time_text_embed = controlled

    def read_lora(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Those of Stable Diffusion 3."""
        from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin as Loader

        return Loader.lora_state_dict(weights), None

    def predict(
        self, x: Tensor, timestep: Tensor, embedding: Tensor, text: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        """Run the transformer."""
        modulation = torch.cat([added[POOLED], embedding], dim=1)
        return self.run(x, timestep, text, modulation)

    def run(
        self, x: Tensor, timestep: Tensor, text: Tensor, modulation: Tensor, **more: Any
    ) -> Tensor:
        """Call the stock network.

        Args:
            x: [B, C, H, W] latents.
            timestep: [B].
            text: [B, L, D].
            modulation: [B, P + E] pooled texts, followed by the control embedding.
            **more: for the stock network.
        """
        output: Tensor = self.transformer(
            x,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=modulation,
            return_dict=False,
            **more,
        )[0]
        return output


class PackedTransformer(TextTransformer):
    """A `FluxTransformer2DModel`, which takes latents as a sequence of 2 x 2 patches.

    Args:
        transformer: the network.
        texts: see `GuidedNetwork`.
        pooled: [P + 1, E] pooled texts.
        guidance_scale: of classifier-free guidance; 1 for none.
        embedded_guidance: guidance scale for a guidance-distilled model; None for others.
    """

    def __init__(self, *given: Any, embedded_guidance: float | None, **named: Any) -> None:
        super().__init__(*given, **named)
        self.embedded_guidance = embedded_guidance

    @property
    def call(self) -> dict[str, Any]:
        """Guidance of either kind, or none."""
        if self.embedded_guidance is not None:
            return {"guidance_scale": self.embedded_guidance}
        if self.guidance_scale == 1:
            return {}
        return {"true_cfg_scale": self.guidance_scale, "negative_prompt": ""}

    def read_lora(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Those of Flux, of several origins."""
        from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin as Loader

        read: tuple[dict[str, Tensor], Any] = Loader.lora_state_dict(weights, return_alphas=True)
        return read

    def run(
        self, x: Tensor, timestep: Tensor, text: Tensor, modulation: Tensor, **more: Any
    ) -> Tensor:
        """Call the stock network on patches, with the positions of patches and texts."""
        rows, columns = (side // _PATCH for side in x.shape[-2:])
        place = torch.zeros(rows, columns, 3, dtype=x.dtype, device=x.device)
        place[..., 1] += torch.arange(rows, device=x.device)[:, None]
        place[..., 2] += torch.arange(columns, device=x.device)
        told = self.embedded_guidance
        output = super().run(
            packed(x),
            timestep / 1000,  # the network multiplies it by 1000
            text,
            modulation,
            guidance=None if told is None else torch.full((len(x),), told, device=x.device),
            txt_ids=place.new_zeros(text.shape[1], 3),
            img_ids=place.flatten(0, 1),
            **more,
        )
        return _unpacked(output, rows)


def packed(latent: Tensor) -> Tensor:
    """Latents [B, C, H, W] as sequences of 2 x 2 patches [B, H W / 4, 4 C]."""
    patches = latent.unflatten(3, (-1, _PATCH)).unflatten(2, (-1, _PATCH))  # [B, C, h, 2, w, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(sequence: Tensor, rows: int) -> Tensor:
    patches = sequence.unflatten(2, (-1, _PATCH, _PATCH)).unflatten(1, (rows, -1))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def sd3_prior(pipeline: Any, settings: TextSettings) -> Prior:
    """A prior from a loaded `StableDiffusion3Pipeline`.

    Args:
        pipeline: its text encoders are used here and not kept.
        settings: of the prior.

    Raises:
        ConfigError: images larger than the model has positions for.
    """
    transformer, size = pipeline.transformer, settings.size
    patch = transformer.config.patch_size
    height, width = latent_size(pipeline, size, transformer.config.sample_size, patch)
    most = transformer.config.pos_embed_max_size * patch * pipeline.vae_scale_factor
    if size is not None and max(size) > most:
        raise ConfigError(f"prior.size={list(size)}: this model draws at most {most} pixels a side")
    if pipeline.tokenizer_3 is None:
        warn_of_long(pipeline.tokenizer, settings.texts)
    else:
        warn_of_long(pipeline.tokenizer_3, settings.texts, _T5_TOKENS["sd3"])
    texts, pooled = encoded(pipeline, settings, prompt_2=None, prompt_3=None)
    scale = settings.guidance(pipeline)
    network = TextTransformer(transformer, texts, pooled, guidance_scale=scale)
    config = _flow_config(pipeline, settings, (height // patch) * (width // patch))
    shape = (transformer.config.in_channels, height, width)
    return guided_prior(pipeline, network, config, shape, settings.prompts)


def flux_prior(pipeline: Any, settings: TextSettings) -> Prior:
    """A prior from a loaded `FluxPipeline`.

    A guidance-distilled model takes the guidance scale as input and needs no second call; others
    have no guidance if the scale is None.

    Args:
        pipeline: its text encoders are used here and not kept.
        settings: of the prior.

    Raises:
        ConfigError: a negative prompt for a guidance-distilled model, or without guidance.
    """
    transformer, negative = pipeline.transformer, settings.negative_prompt
    distilled = bool(transformer.config.guidance_embeds)
    if distilled and negative:
        raise ConfigError(
            f"prior.negative_prompt='{negative}': this model is guidance-distilled and takes none; "
            "leave it out"
        )
    scale = settings.guidance(pipeline) if distilled else settings.guidance_scale or 1.0
    if scale == 1 and negative:
        raise ConfigError(
            f"prior.negative_prompt='{negative}' does nothing without guidance, which this model "
            "has none of by itself; leave it out, or give prior.guidance_scale above 1"
        )
    height, width = latent_size(pipeline, settings.size, pipeline.default_sample_size, _PATCH)
    warn_of_long(pipeline.tokenizer_2, settings.texts, _T5_TOKENS["flux"])
    encode = partial(pipeline.encode_prompt, device=torch.device("cpu"))
    with torch.no_grad():
        rows = [encode(text)[:2] for text in settings.texts]
    texts, pooled = (torch.cat(parts) for parts in zip(*rows, strict=True))
    network = PackedTransformer(
        transformer,
        texts,
        pooled,
        guidance_scale=1.0 if distilled else scale,
        embedded_guidance=scale if distilled else None,
    )
    tokens = (height // _PATCH) * (width // _PATCH)
    config = _flow_config(pipeline, settings, tokens) | {UNIFORM: True}
    shape = (transformer.config.in_channels // _PATCH**2, height, width)
    return guided_prior(pipeline, network, config, shape, settings.prompts)


def _flow_config(pipeline: Any, given: TextSettings, tokens: int) -> dict[str, Any]:
    """What is read of the scheduler's config, with its pipeline's shift for so many patches."""
    config = given.scheduler_config(pipeline)
    settings = scheduler_settings(config)
    if settings.get("prediction_type") != FLOW:
        raise ConfigError(
            f"prior.path holds a {type(pipeline).__name__}, a flow-matching model, whose scheduler "
            f"is a {config[CLASS]}; give it a FlowMatchEulerDiscreteScheduler"
        )
    full = flow_scheduler(settings).config
    if full.use_dynamic_shifting:
        few, many = full.base_image_seq_len, full.max_image_seq_len
        if few == many:
            raise ConfigError(
                f"the scheduler's base_image_seq_len and max_image_seq_len are both {few}; its "
                "shift depends on the size by two of them"
            )
        slope = (full.max_shift - full.base_shift) / (many - few)
        settings[SHIFT] = full.base_shift + slope * (tokens - few)
    return settings
