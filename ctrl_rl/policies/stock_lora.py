"""A LoRA that was trained elsewhere, for a stock diffusers pipeline, on the prior's own network.

Only safetensors are read: nothing in the file is run. What the names of weights mean, and what
holds where rank and alpha are not given, is left to diffusers, which also loads the weights, as
`load_lora_weights` does. But where that skips or warns, this refuses.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ctrl_rl import keys
from ctrl_rl.assets import resolve
from ctrl_rl.errors import ConfigError, one_line
from ctrl_rl.kernels import TransitionKernel
from ctrl_rl.policies.low_rank import SwitchedDenoiser, adapted_layers, new_name
from ctrl_rl.policies.policy import DenoisingPolicy
from ctrl_rl.priors import Denoiser, Prior
from ctrl_rl.priors.diffusers.guided import GuidedNetwork

_FILE = "pytorch_lora_weights.safetensors"  # what diffusers writes
_HEADER = "lora_adapter_metadata"  # where it writes rank and alpha
_MATRIX = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
# Of the metadata: what is read, and what means nothing for weights that are loaded.
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora"}
_MEANS_NOTHING = {"base_model_name_or_path", "revision", "task_type", "inference_mode"}
_MEANS_NOTHING |= {"auto_mapping", "peft_type", "peft_version", "lora_dropout", "exclude_modules"}
_PLAIN_STARTS = (True, False, "gaussian")  # of `init_lora_weights`; others change the base model


class StockLoraPolicy(DenoisingPolicy):
    """The prior's network with a LoRA switched on; it reads no control but the prompt.

    Args:
        prior: the base model: a text-to-image pipeline.
        kernel: the transition kernel.
        path: the file, or the folder that has it.

    Raises:
        ConfigError: no such file, none of safetensors, a LoRA of something else than the prior's
            network, or peft is not installed.
    """

    def __init__(self, *, prior: Prior, kernel: TransitionKernel, path: str) -> None:
        super().__init__(kernel)
        weights, metadata = _read(path)
        self.denoiser = _loaded(path, weights, metadata, prior.denoiser)

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Mean of the kernel's step from the adapted network."""
        del prior_loc
        prompt = control.get(keys.PROMPT)
        denoised = self.denoiser(x, self.kernel.timesteps[step], None, prompt)
        return self.kernel.mean(x, denoised, step)


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights and metadata of a file, or of the one in a folder."""
    from safetensors import SafetensorError, safe_open

    file = _file(path)
    try:
        with safe_open(file, framework="pt") as content:
            header = (content.metadata() or {}).get(_HEADER)
            weights = {name: content.get_tensor(name) for name in content.keys()}
        metadata = None if header is None else dict(json.loads(header))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the LoRA {file} is no safetensors file ({one_line(error, 100)}); files of other "
            "kinds, such as .bin and .pt, are not read, as they can run code"
        ) from error
    return weights, metadata


def _file(path: str) -> Path:
    place = resolve(path)
    if not place.exists():
        raise ConfigError(f"there is no LoRA at {path}; give its file, or the folder with {_FILE}")
    if place.is_file():
        return place
    if (place / _FILE).is_file():
        return place / _FILE
    found = sorted(file.name for file in place.iterdir())
    near = [name for name in found if name.endswith(".safetensors")] or found
    raise ConfigError(
        f"the folder {path} has no {_FILE}, which diffusers writes, but "
        f"{', '.join(near[:5]) or 'nothing'}; give the file itself if it has another name"
    )


def _loaded(
    path: str, weights: dict[str, Tensor], metadata: dict[str, Any] | None, denoiser: Denoiser
) -> SwitchedDenoiser:
    """The denoiser with the weights in its network, and off until it runs."""
    network = getattr(denoiser, "network", None)
    if not isinstance(network, GuidedNetwork):
        raise ConfigError(
            "a LoRA of a diffusers pipeline needs a text-to-image pipeline as the prior, and this "
            f"task's has a {type(network).__name__}; give the base model: prior=diffusers "
            "prior.path=… prior.prompts=[…]"
        )
    name = new_name(denoiser, "a LoRA")
    before = {p for p in denoiser.parameters() if p.requires_grad}
    metadata = None if metadata is None else _checked_metadata(path, metadata, network.part)
    try:
        read, alphas = network.read_lora(dict(weights))
        with network.stock() as stock:
            prefix = f"{network.part}."
            fitting = _checked(path, read, prefix, stock)
            stock.load_lora_adapter(
                {prefix + key: weight for key, weight in fitting.items()},
                prefix=network.part,
                network_alphas=alphas,
                metadata=metadata,
                adapter_name=name,
            )
    except (ValueError, TypeError, RuntimeError, KeyError) as error:  # of diffusers and peft
        raise ConfigError(f"the LoRA {path} cannot be loaded: {one_line(error, 200)}") from error
    layers = adapted_layers(denoiser, name)
    asked = {key.rpartition(".lora_")[0] for key in fitting}
    if len(layers) != len(asked):  # its metadata may leave layers out
        raise ConfigError(
            f"the LoRA {path} has weights of {len(asked)} layers, and its metadata lets "
            f"{len(layers)} have them"
        )
    for layer in layers.values():
        layer.lora_A[name].requires_grad_(False)
        layer.lora_B[name].requires_grad_(False)
    for parameter in before:  # peft has frozen the adapters of other policies
        parameter.requires_grad_(True)
    return SwitchedDenoiser(denoiser, name, layers.values())


def _checked(
    path: str, weights: dict[str, Tensor], prefix: str, stock: nn.Module
) -> dict[str, Tensor]:
    """Weights in peft's names, without the prefix: pairs of matrices that fit layers."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    kind = type(stock).__name__
    others = [key for key in weights if not key.startswith(prefix)]
    if others or not weights:
        texts = [key for key in others if key.startswith("text_encoder")]
        reason = (
            "is of the text encoder, and the prior's prompts are encoded by the base model's; save "
            f"the {kind}'s adapters alone"
            if texts
            else f"does not begin with {prefix}, as diffusers' save_lora_weights writes it"
        )
        shown = f"the first {(texts or others)[0]}, {reason}" if others else "it is empty"
        raise ConfigError(
            f"the LoRA {path}: {len(texts or others)} of its {len(weights)} keys cannot be used: "
            f"{shown}"
        )
    plain = {key.removeprefix(prefix): weight for key, weight in weights.items()}
    if not any("lora_A" in key for key in plain):
        plain = convert_unet_state_dict_to_peft(plain)
    modules = dict(stock.named_modules())
    misfits = {key: why for key in plain if (why := _misfit(key, plain, modules))}
    if misfits:
        key, why = next(iter(misfits.items()))
        raise ConfigError(
            f"the LoRA {path} does not fit the base model's {kind}: {len(misfits)} of its "
            f"{len(plain)} keys, the first {prefix}{key}: {why}; give the base model that it was "
            "trained on, prior.path=…"
        )
    return plain


def _misfit(key: str, weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> str:
    """Why a weight is not one of a pair of matrices for a layer; empty if it is."""
    matrix = _MATRIX.fullmatch(key)
    if matrix is None:
        return "it is no matrix of a LoRA"
    module = modules.get(matrix[1])
    layer = getattr(getattr(module, "base_layer", module), "weight", None)
    if not isinstance(layer, Tensor):
        return "there is no such layer"
    down, up = (weights.get(f"{matrix[1]}.{half}.weight") for half in ("lora_A", "lora_B"))
    if down is None or up is None:
        return "the other matrix of the pair is missing"
    if (up.shape[0], *down.shape[1:]) != tuple(layer.shape) or up.shape[1] != down.shape[0]:
        return f"{tuple(up.shape)} x {tuple(down.shape)} is no update of {tuple(layer.shape)}"
    return ""


def _checked_metadata(path: str, metadata: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What is read of it, by diffusers' names; refused if anything else would matter.

    peft takes settings from it that import modules or change the base model's weights.
    """
    from peft import LoraConfig

    usual, kept = LoraConfig().to_dict(), {}
    for name, value in metadata.items():
        owner, _, setting = name.partition(".")
        fine = _PLAIN_STARTS if setting == "init_lora_weights" else (usual.get(setting),)
        if owner == part and setting in _READ:
            kept[name] = value
        elif owner == part and setting not in _MEANS_NOTHING and value not in fine:
            raise ConfigError(
                f"the LoRA {path} has {setting}={value} in its metadata, which is not supported; "
                "its weights would mean something else than a low-rank update"
            )
    return kept
