"""An unconditional diffusers UNet as a prior, from a pipeline folder on disk."""

import json
from typing import Any

from torch import Tensor, nn

from ctrl_rl.assets import resolve
from ctrl_rl.errors import ConfigError
from ctrl_rl.priors.prior import NetworkDenoiser, Prior


class UNetWithEmbedding(nn.Module):
    """A diffusers `UNet2DModel` that takes a ready embedding, added to its time embedding.

    `class_embedding = Identity` makes the stock model accept a vector through `class_labels`, so
    no forward pass is patched; a zero vector changes no bit of the output.
    """

    unet: Any

    def __init__(self, unet: Any) -> None:
        super().__init__()
        unet.class_embedding = nn.Identity()
        self.unet = unet

    @property
    def embedding_features(self) -> int:
        """Width of the time embedding."""
        return int(self.unet.time_embedding.linear_2.out_features)

    def forward(self, x: Tensor, timestep: Tensor, embedding: Tensor | None) -> Tensor:
        """Predict [B, C, H, W] from a latent of the same shape."""
        if embedding is None:
            embedding = x.new_zeros(x.shape[0], self.embedding_features)
        output: Tensor = self.unet(x, timestep, class_labels=embedding, return_dict=False)[0]
        return output


def diffusers_unet_prior(*, path: str) -> Prior:
    """Load a `DDPMPipeline` or `DDIMPipeline` folder: `unet/` and `scheduler/`.

    Args:
        path: a folder, or ``package://NAME`` for weights shipped with the project.

    Raises:
        ConfigError: the folder is not an unconditional diffusers pipeline.
    """
    from diffusers import UNet2DModel

    folder = resolve(path)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for needed in (scheduler, weights, folder / "unet" / "config.json"):
        if not needed.is_file():
            raise ConfigError(
                f"prior.path={path} has no {needed.relative_to(folder)}; give a diffusers pipeline "
                "folder with unet/ and scheduler/, such as `ctrl-rl pretrain` writes"
            )
    try:
        scheduler_config: dict[str, Any] = json.loads(scheduler.read_text())
    except ValueError as error:
        raise ConfigError(f"prior.path={path}: {scheduler.name} is no json: {error}") from error
    try:
        unet = UNet2DModel.from_pretrained(
            folder / "unet", use_safetensors=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers and safetensors raise many kinds for a broken file
        raise ConfigError(f"prior.path={path} cannot be read as a UNet2DModel: {error}") from error
    if unet.class_embedding is not None or unet.config.out_channels != unet.config.in_channels:
        raise ConfigError(
            f"prior.path={path} holds a class-conditional UNet or one that predicts a variance; "
            "give an unconditional one with as many output as input channels"
        )
    network = UNetWithEmbedding(unet)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    denoiser = NetworkDenoiser(
        network, scheduler_config, embedding_features=network.embedding_features
    )
    return Prior(denoiser, scheduler_config, shape=(unet.config.in_channels, height, width))
