"""Text-conditional latent UNets of diffusers (Stable Diffusion 1.x and 2.x, SDXL) as priors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.kernels.settings import scheduler_settings
from ctrl_rl.networks.texts import warn_of_long
from ctrl_rl.priors.diffusers.guided import (
    GuidedNetwork,
    TextSettings,
    encoded,
    guided_prior,
    latent_size,
)
from ctrl_rl.priors.prior import Prior


class TextUNet(GuidedNetwork):
    """A `UNet2DConditionModel`; the control embedding is added to its time embedding.

    Args:
        unet: the network; `class_embedding = Identity` makes the stock model accept a vector
            through `class_labels`.
        texts: see `GuidedNetwork`.
        added: SDXL's other inputs per prompt, or nothing.
        guidance_scale: 1 for no guidance.
    """

    part = "unet"
    unet: Any

    def __init__(
        self, unet: Any, texts: Tensor, added: Mapping[str, Tensor], *, guidance_scale: float
    ) -> None:
        super().__init__(texts, added, guidance_scale=guidance_scale)
        unet.class_embedding = nn.Identity()
        self.unet = unet

    @property
    def embedding_features(self) -> int:
        """Width of the time embedding."""
        return int(self.unet.time_embedding.linear_2.out_features)

    def read_lora(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Those of Stable Diffusion and SDXL, kohya's included."""
        from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin as Loader

        read: tuple[dict[str, Tensor], Any] = Loader.lora_state_dict(
            weights, unet_config=self.unet.config
        )
        return read

    def predict(
        self, x: Tensor, timestep: Tensor, embedding: Tensor, text: Tensor, added: dict[str, Tensor]
    ) -> Tensor:
        """Run the UNet."""
        output: Tensor = self.unet(
            x,
            timestep,
            encoder_hidden_states=text,
            class_labels=embedding,
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return output


def text_unet_prior(pipeline: Any, settings: TextSettings) -> Prior:
    """A prior from a loaded `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.

    Args:
        pipeline: its text encoders are used here and not kept.
        settings: of the prior.

    Raises:
        ConfigError: the UNet has class labels already, or unequal input and output channels.
    """
    unet = pipeline.unet
    if unet.class_embedding is not None or unet.config.in_channels != unet.config.out_channels:
        raise ConfigError(
            f"prior.path holds a {type(pipeline).__name__} whose UNet takes class labels or more "
            "channels than it predicts (inpainting, edits); give a text-to-image model"
        )
    height, width = latent_size(pipeline, settings.size, unet.config.sample_size)
    warn_of_long(pipeline.tokenizer, settings.texts)
    texts, *pooled = encoded(pipeline, settings)
    added = {}
    if pooled:
        # Size asked for, corner of the crop, size of the picture, in pixels (Podell et al., "SDXL",
        # arXiv 2307.01952, sec. 2.2): no crop, as in the stock pipeline.
        pixels = [pipeline.vae_scale_factor * side for side in (height, width)]
        time_ids = torch.tensor([[*pixels, 0, 0, *pixels]]).expand(len(texts), -1)
        added = {"text_embeds": pooled[0], "time_ids": time_ids.to(texts.dtype)}
    network = TextUNet(unet, texts, added, guidance_scale=settings.guidance(pipeline))
    # Schedulers of latent models omit it or set False; the kernels' default is for pixels.
    config = {"clip_sample": False, **scheduler_settings(settings.scheduler_config(pipeline))}
    shape = (unet.config.in_channels, height, width)
    return guided_prior(pipeline, network, config, shape, settings.prompts)
