"""Small random pipelines of diffusers' real classes, written to disk as the hub has them."""

import json
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


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion 1.x: one text encoder, and the scheduler of its config."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    return _written(
        folder,
        StableDiffusionPipeline,
        unet=lambda: unet(16),
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


def _written(
    folder: Path, kind: Any, *, unet: Any, second_encoder: bool = False, **more: Any
) -> Path:
    """A pipeline with random weights on disk."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    parts = {"vae": autoencoder(), "text_encoder": text_encoder(tokenizer), "tokenizer": tokenizer}
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
MAKERS = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl}
