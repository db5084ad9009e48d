"""`prior=diffusers`: any pipeline that the project knows, by folder or hub id."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ctrl_rl.assets import resolve, unreachable
from ctrl_rl.errors import ConfigError, check_choice
from ctrl_rl.kernels.settings import CLASS
from ctrl_rl.priors.diffusers.folder import INDEX, model_index, scheduler_config
from ctrl_rl.priors.diffusers.guided import TextSettings
from ctrl_rl.priors.diffusers.text_transformer import flux_prior, sd3_prior
from ctrl_rl.priors.diffusers.text_unet import text_unet_prior
from ctrl_rl.priors.diffusers.unet import diffusers_unet_prior
from ctrl_rl.priors.prior import Prior, Prompts

_DTYPES = ("float32", "bfloat16", "float16")
_UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")
_TEXT = {
    "StableDiffusionPipeline": text_unet_prior,
    "StableDiffusionXLPipeline": text_unet_prior,
    "StableDiffusion3Pipeline": sd3_prior,
    "FluxPipeline": flux_prior,
}


def diffusers_prior(
    *,
    path: str,
    prompts: Sequence[str] | None = None,
    evaluation_prompts: Sequence[str] | None = None,
    negative_prompt: str = "",
    guidance_scale: float | None = None,
    size: Sequence[int] | None = None,
    dtype: str = "float32",
    scheduler: Mapping[str, Any] | None = None,
) -> Prior:
    """Load a diffusers pipeline as a prior.

    Args:
        path: the pipeline's folder, its id on the hub, or ``package://NAME`` for weights shipped
            with the project.
        prompts: what a text pipeline draws in training; null for unconditional ones.
        evaluation_prompts: what it draws in evaluations; None for the same.
        negative_prompt: what guidance leads away from.
        guidance_scale: of classifier-free guidance, at least 1; the guided law is the prior. 1 for
            no guidance, at half the cost; None for the pipeline's own default.
        size: height and width of a text pipeline's images, in pixels; None for the model's own.
        dtype: of a text pipeline's networks; everything Gaussian is always float32.
        scheduler: settings in place of those of its scheduler_config.json; null takes one out.

    Raises:
        ConfigError: no such pipeline, an unknown kind, or settings that do not fit it.
    """
    check_choice("prior.dtype", dtype, _DTYPES)
    folder = resolve(path)
    if (folder / "unet").is_dir() and not (folder / INDEX).is_file():
        kind = _UNCONDITIONAL[0]  # unet/ and scheduler/ by themselves, as `ctrl-rl pretrain` writes
    else:
        index = model_index(path)
        kind = index[CLASS]
    if kind in _UNCONDITIONAL:
        given = {
            "prompts": prompts,
            "evaluation_prompts": evaluation_prompts,
            "negative_prompt": negative_prompt or None,
            "guidance_scale": guidance_scale,
            "size": size,
            "dtype": None if dtype == _DTYPES[0] else dtype,
        }
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"prior.{name}={value}, but prior.path={path} is a {kind}, which has no "
                    "prompts, one size and float32; leave it out"
                )
        return diffusers_unet_prior(path=path, scheduler=scheduler)
    check_choice("the pipeline of prior.path", kind, (*_UNCONDITIONAL, *_TEXT))
    if guidance_scale is not None and not (guidance_scale >= 1 and math.isfinite(guidance_scale)):
        raise ConfigError(f"prior.guidance_scale={guidance_scale} must be 1 (no guidance) or more")
    if guidance_scale == 1 and negative_prompt:
        raise ConfigError(
            f"prior.negative_prompt='{negative_prompt}' does nothing without guidance; leave it "
            "out, or give prior.guidance_scale above 1"
        )
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ConfigError(f"prior.size={list(size)} must be [height, width], in pixels")
    settings = TextSettings(  # before anything large is read
        prompts=_prompts(kind, prompts, evaluation_prompts),
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        size=size,
        scheduler=scheduler,
    )
    scheduler_config(path, scheduler, index)
    source = str(folder) if folder.is_dir() else path
    return _TEXT[kind](_load(kind, path, source, dtype), settings)


def _prompts(
    kind: str, training: Sequence[str] | None, evaluation: Sequence[str] | None
) -> Prompts:
    if not training:
        raise ConfigError(
            f"prior.path holds a {kind}, which draws prompts; give prior.prompts, such as [cat,dog]"
        )
    for name, given in (("prompts", training), ("evaluation_prompts", evaluation)):
        if isinstance(given, str):
            raise ConfigError(f"prior.{name}={given} must be a list, such as [{given}]")
    prompts = Prompts(tuple(training), tuple(training if evaluation is None else evaluation))
    for name, given in (("prompts", prompts.training), ("evaluation_prompts", prompts.evaluation)):
        twice = [prompt for prompt in given if given.count(prompt) > 1]
        if not given or twice:
            what = f"has '{twice[0]}' twice; give each once" if twice else "is empty; leave it out"
            raise ConfigError(f"prior.{name} {what}")
    return prompts


def _load(kind: str, path: str, source: str, dtype: str) -> Any:
    import diffusers

    try:
        import transformers  # noqa: F401 (diffusers needs it for text, and says so at length)
    except ImportError as error:
        raise ConfigError(
            'a text pipeline needs a package that is not here: pip install "ctrl-rl[pipelines]"'
        ) from error
    without = {"safety_checker": None, "requires_safety_checker": False}
    kept = {} if kind != "StableDiffusionPipeline" else without
    try:
        return getattr(diffusers, kind).from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            **kept,
        )
    except Exception as error:  # a broken folder, an aborted download: many kinds
        raise unreachable("prior.path", path, f"a {kind}", error) from error
