"""An unconditional diffusers UNet as a prior, from a pipeline folder on disk."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ctrl_rl.assets import only_pickles, pickles, resolve
from ctrl_rl.errors import ConfigError, one_line
from ctrl_rl.files import first_not_finite
from ctrl_rl.kernels.settings import scheduler_settings
from ctrl_rl.priors.diffusers.folder import INDEX, SCHEDULER, read_object, scheduler_config
from ctrl_rl.priors.prior import NetworkDenoiser, Prior

_CONFIG, _WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"


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


def diffusers_unet_prior(*, path: str, scheduler: Mapping[str, Any] | None = None) -> Prior:
    """Load a `DDPMPipeline` or `DDIMPipeline` folder: `unet/` and `scheduler/`.

    Args:
        path: a folder, or ``package://NAME`` for weights shipped with the project.
        scheduler: settings in place of those of its scheduler_config.json; null takes one out.

    Raises:
        ConfigError: the folder is not an unconditional diffusers pipeline.
    """
    from diffusers import UNet2DModel

    folder = resolve(path)
    for needed in (SCHEDULER, _WEIGHTS, _CONFIG):
        if (folder / needed).is_file():
            continue
        pickled = pickles((folder / needed).parent)
        if needed == _WEIGHTS and pickled:
            raise only_pickles("prior.path", path, pickled[0])
        raise ConfigError(
            f"prior.path={path} has no {needed}; give a diffusers pipeline folder with unet/ and "
            "scheduler/, such as `ctrl-rl pretrain` writes"
        )
    index = read_object(folder, INDEX, path) if (folder / INDEX).is_file() else None
    config = scheduler_config(path, scheduler, index)
    read_object(folder, _CONFIG, path)
    try:
        unet, loading = UNet2DModel.from_pretrained(
            folder / "unet",
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and safetensors raise many kinds for a broken file
        reason = one_line(error, 200)
        raise ConfigError(f"prior.path={path} cannot be read as a UNet2DModel: {reason}") from error
    broken = first_not_finite(unet.state_dict())
    if broken:
        raise ConfigError(
            f"prior.path={path}: {_WEIGHTS}: {broken} has values that are no finite numbers; give "
            "a whole one"
        )
    absent = sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])])
    if absent:
        raise ConfigError(
            f"prior.path={path} lacks {absent[0]} and {len(absent) - 1} more weights of its "
            "UNet2DModel, which would be random; give a complete one"
        )
    if unet.class_embedding is not None or unet.config.out_channels != unet.config.in_channels:
        raise ConfigError(
            f"prior.path={path} holds a class-conditional UNet or one that predicts a variance; "
            "give an unconditional one with as many output as input channels"
        )
    network = UNetWithEmbedding(unet)
    size = unet.config.sample_size
    if size is None:
        raise ConfigError(
            f"prior.path={path}: {_CONFIG} has no sample_size; add it, such as 32 or [32, 24]"
        )
    height, width = (size, size) if isinstance(size, int) else size
    settings = scheduler_settings(config)
    denoiser = NetworkDenoiser(network, settings, embedding_features=network.embedding_features)
    return Prior(denoiser, settings, shape=(unet.config.in_channels, height, width))
