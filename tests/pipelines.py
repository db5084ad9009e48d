"""Small random pipelines of diffusers' real classes, written to disk as the hub has them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer without merges: every byte is a token of its own."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def text_encoder(tokenizer: Any, kind: str = "CLIPTextModel") -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, kind)(config)


def unet(context: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=8,
        norm_num_groups=8,
        **more,
    )


def autoencoder(widths: tuple[int, ...] = (8, 16), **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8 * 2 ** (len(widths) - 1),
        **more,
    )


def vivid_autoencoder() -> Any:
    """One with the real one's four blocks, whose pixels go from black to white as real ones do."""
    vae = autoencoder((8, 8, 16, 16))
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4  # the default's give a grey with a deviation of 0.3
        vae.decoder.conv_out.bias += 1
    return vae


def stable_diffusion(folder: Path, vae: Callable[[], Any] = autoencoder) -> Path:
    """Stable Diffusion 1.x: one text encoder, and the scheduler of its config."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return _written(
        folder,
        StableDiffusionPipeline,
        unet=lambda: unet(16),
        vae=vae,
        scheduler=PNDMScheduler(**_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> Path:
    """SDXL: two text encoders, pooled texts and sizes as added conditions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return _written(
        folder,
        StableDiffusionXLPipeline,
        unet=lambda: unet(32, projection_class_embeddings_input_dim=16 + 6 * 8, **added),
        second_encoder=True,
        scheduler=EulerDiscreteScheduler(**_BETAS),
        add_watermarker=False,
    )


def stable_diffusion_3(folder: Path) -> Path:
    """Stable Diffusion 3: two CLIP encoders, T5, a transformer and flow matching."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    clip = byte_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer=_with_modulation(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.06),
        text_encoder=text_encoder(clip, "CLIPTextModelWithProjection"),
        tokenizer=clip,
        text_encoder_2=text_encoder(clip, "CLIPTextModelWithProjection"),
        tokenizer_2=clip,
        **_t5(3),
    ).save_pretrained(folder)
    return folder


def flux(folder: Path, *, distilled: bool = False) -> Path:
    """Flux: CLIP's pooled texts, T5, packed latents; guidance-distilled (dev) or not (schnell)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    clip = byte_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=distilled,
    )
    scheduler = {"use_dynamic_shifting": True, "shift": 3.0} if distilled else {"shift": 1.0}
    FluxPipeline(
        transformer=_with_modulation(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=text_encoder(clip),
        tokenizer=clip,
        **_t5(2),
    ).save_pretrained(folder)
    return folder


def flux_dev(folder: Path) -> Path:
    """The guidance-distilled Flux."""
    return flux(folder, distilled=True)


def _with_modulation(transformer: Any) -> Any:
    """Random weights where the class starts at zero, so that conditions matter."""
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    return transformer


def _t5(place: int) -> dict[str, Any]:
    """A T5 encoder and a tokenizer of letters, by the names that a pipeline gives them."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [(chr(code), -3.0) for code in range(33, 127)]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0), *letters]
    tokenizer = T5TokenizerFast(vocab=words, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    encoder = T5EncoderModel(config)
    return {f"text_encoder_{place}": encoder, f"tokenizer_{place}": tokenizer}


def _written(
    folder: Path,
    kind: Any,
    *,
    unet: Any,
    vae: Callable[[], Any] = autoencoder,
    second_encoder: bool = False,
    **more: Any,
) -> Path:
    """A pipeline with random weights on disk."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    parts = {"vae": vae(), "text_encoder": text_encoder(tokenizer), "tokenizer": tokenizer}
    if second_encoder:
        parts["text_encoder_2"] = text_encoder(tokenizer, "CLIPTextModelWithProjection")
        parts["tokenizer_2"] = tokenizer
    kind(unet=unet(), **parts, **more).save_pretrained(folder)
    return _with_scheduler_config(folder)


def _with_scheduler_config(folder: Path) -> Path:
    """Add what the hub's configs of both models have, for schedulers other than their own."""
    file = folder / "scheduler" / "scheduler_config.json"
    more = {"set_alpha_to_one": False, "timestep_spacing": "leading"}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DIFFUSION = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl}
FLOWS = {"sd3": stable_diffusion_3, "flux": flux, "flux-dev": flux_dev}
MAKERS = {**DIFFUSION, **FLOWS}
SIZES = {"flux": [16, 16], "flux-dev": [16, 16]}  # whose configs do not say how large images are


def noise_like(
    latents: torch.Tensor, generator: torch.Generator | list[torch.Generator]
) -> torch.Tensor:
    """Noise for latents, drawn as [B, 4, 8, 8] where the pipeline has packed them."""
    from diffusers.utils.torch_utils import randn_tensor

    from ctrl_rl.priors.diffusers.text_transformer import packed

    if latents.ndim == 4:
        return randn_tensor(latents.shape, generator=generator)
    return packed(randn_tensor((len(latents), 4, 8, 8), generator=generator))
