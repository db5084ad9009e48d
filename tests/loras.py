"""LoRAs of small random pipelines, and the policies that they are."""

from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from pipelines import SIZES
from torch import Tensor

from ctrl_rl.kernels import ddim_kernel, flow_sde_kernel
from ctrl_rl.policies.stock_lora import StockLoraPolicy
from ctrl_rl.priors import Prior
from ctrl_rl.priors.pipelines import diffusers_prior

FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_v", "time_embedding.linear_1", "conv1", "timestep_embedder.linear_1"]


def prior_of(kind: str, base: Path) -> Prior:
    return diffusers_prior(
        path=str(base), prompts=["a cat", "a dog"], guidance_scale=2.0, size=SIZES.get(kind)
    )


def stock(base: Path) -> Any:
    kind = diffusers.DiffusionPipeline.load_config(base)["_class_name"]
    more = {"safety_checker": None} if kind == "StableDiffusionPipeline" else {}
    return getattr(diffusers, kind).from_pretrained(base, **more)


def trained_by_diffusers(base: Path, folder: Path, *, metadata: bool = True, **more: Any) -> Path:
    """A LoRA with random weights, written as diffusers' training scripts do."""
    pipeline = stock(base)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    network = getattr(pipeline, part)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        given = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, **more}
        network.add_adapter(peft.LoraConfig(**given, init_lora_weights=False))
    layers = {f"{part}_lora_layers": peft.get_peft_model_state_dict(network)}
    if metadata:
        config = network.peft_config["default"].to_dict()
        layers[f"{part}_lora_adapter_metadata"] = config
    pipeline.save_lora_weights(folder, **layers)
    return folder


def means(prior: Prior, lora: Path | None = None) -> Tensor:
    """Means of the next latent at some states, of a LoRA's policy or of the prior."""
    make = flow_sde_kernel if "shift" in prior.scheduler_config else ddim_kernel
    kernel = make(num_steps=4, scheduler_config=prior.scheduler_config)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *prior.shape, generator=generator)
    step, prompt = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        if lora is None:
            return kernel.mean(x, prior.denoiser(x, kernel.timesteps[step], None, prompt), step)
        policy = StockLoraPolicy(prior=prior, kernel=kernel, path=str(lora))
        return policy.loc(x, step, {"prompt": prompt}, torch.zeros_like(x))
