"""A run for diffusers: a LoRA for stock pipelines, a `ControlledPipeline`, a model card."""

from pathlib import Path
from typing import Any

import diffusers
from omegaconf import OmegaConf

from ctrl_rl.assets import resolve
from ctrl_rl.controls import as_control, described
from ctrl_rl.errors import ConfigError, one_line
from ctrl_rl.export.pipeline import ADAPTERS, EXPORT, FILES, write_control
from ctrl_rl.files import write_text
from ctrl_rl.policies import LowRankPolicy, RewardGuidedPolicy
from ctrl_rl.priors.diffusers.guided import GuidedNetwork
from ctrl_rl.runs.loaded import LoadedRun
from ctrl_rl.unfinished import unfinished

_OF_SCHEDULER = {"noise_level"}  # settings that kernels share with their schedulers
_SCHEDULERS = {  # by the choice of kernel
    "ddim": "VisitedDDIMScheduler",
    "ddpm": "VisitedDDPMScheduler",
    "euler_ancestral": "UnitStartEulerAncestralScheduler",
    "flow_sde": "FlowSDEScheduler",
}


def export_run(
    run: LoadedRun, folder: Path, *, base: str | None = None, hub: str | None = None
) -> None:
    """Write a run.

    Args:
        run: with adapters on a text-to-image pipeline.
        folder: gets the adapters, the tables of the controls, control.json and README.md; an
            earlier export in it is replaced, when all of the new one is written.
        base: folder or hub id under which others find the base model; None for `prior.path`.
        hub: id that the folder will have on the hub, for the card; None for none.

    Raises:
        ConfigError: the run has no adapters, its prior is not a text-to-image pipeline, or the
            folder holds anything but an export.
        RunError: the folder cannot be written.
    """
    config, policy, prior = run.config, run.policy, run.prior
    kernel = run.env.process.kernel
    if isinstance(policy, RewardGuidedPolicy):
        raise ConfigError(
            f"{run.run.path} has guidance={config.choices.guidance}, which needs the reward at "
            "every step, and a LoRA cannot hold that; train with guidance=null to export"
        )
    if not isinstance(policy, LowRankPolicy) or prior.prompts is None:
        raise ConfigError(
            f"{run.run.path} has policy={config.choices.policy} and prior={config.choices.prior}; "
            "what can be exported is policy=low_rank on a text-to-image pipeline"
        )
    if config.choices.kernel not in _SCHEDULERS:
        raise ConfigError(
            f"{run.run.path} has kernel={config.choices.kernel}, for which there is no diffusers "
            f"scheduler; what can be exported: {', '.join(_SCHEDULERS)}"
        )
    network = getattr(prior.denoiser, "network", None)
    if not isinstance(network, GuidedNetwork):
        raise ConfigError(
            f"{run.run.path} has a prior of your own; what can be exported are diffusers pipelines"
        )
    here = resolve(config.prior.path)
    source = str(here.resolve()) if here.is_dir() else str(config.prior.path)
    kind = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
    weights = {
        network.stock_name(name.removeprefix(f"network.{network.part}.")): weight.cpu().contiguous()
        for name, weight in policy.denoiser.adapter_weights().items()
    }
    layers = {f"{network.part}_lora_layers": weights}
    call: dict[str, Any] = {
        "num_inference_steps": len(kernel.timesteps),  # the read-out included
        **network.call,
    }
    if config.prior.negative_prompt:
        call["negative_prompt"] = config.prior.negative_prompt
    if config.prior.get("size"):
        call["height"], call["width"] = config.prior.size
    if config.choices.kernel == "ddim":
        call["eta"] = config.kernel.eta
    if config.kernel.get("timesteps"):
        call["timesteps"] = list(config.kernel.timesteps)
    prior_config: Any = OmegaConf.to_container(config.prior)
    settings = {
        "base_model": base or source,
        "pipeline": kind,
        "dtype": config.prior.dtype,
        "part": network.part,
        "scheduler": _SCHEDULERS[config.choices.kernel],
        "scheduler_config": prior_config.get("scheduler") or {},
        "scheduler_settings": {key: config.kernel[key] for key in _OF_SCHEDULER & {*config.kernel}},
        "controls": {name: one.as_json() for name, one in run.env.process.controls.items()},
        "read_out": kernel.has_read_out,
        "call": call,
    }
    with unfinished(folder, EXPORT, {}) as work, work.result() as place:
        getattr(diffusers, kind).save_lora_weights(place, **layers, weight_name=ADAPTERS)
        write_text(place / "README.md", _card(run, settings, hub or "path/to/this/folder"))
        write_control(place, policy.embedding, settings)


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload an exported folder to the hub.

    Args:
        folder: what `export_run` wrote.
        name: of the model there, such as me/sd-sizes; created if missing.
        private: whether a new one is hidden from others.

    Returns:
        Its address.

    Raises:
        ConfigError: the hub cannot be reached or refuses, or what should be private is public.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:  # if it existed before
            raise PermissionError("it is there already, and everyone sees it")
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=FILES)
    except Exception as error:  # from the hub's client: many kinds
        reason = one_line(error, 200)
        raise ConfigError(
            f"hub={name} could not be written ({type(error).__name__}: {reason}); {folder} is "
            "complete. Log in by `hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error
    return f"https://huggingface.co/{name}"


_READ_OUT = " (but for the last step, without noise, which was trained as the base model's)"
_FIGURES = ("task", "agent", "seed", "steps", "gap_nats", "kl_nats", "reward", "accuracy")


def _card(run: LoadedRun, settings: dict[str, Any], where: str) -> str:
    """The model card."""
    known = {name: as_control(one, name) for name, one in settings["controls"].items()}
    controls = described(known)
    figures = "\n".join(
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name in _FIGURES
        if (value := run.summary.get(name)) is not None
    )
    example = {name: one.shown(one.some_value) for name, one in known.items()}
    control = f", control={example}" if example else ""
    what = f" with a control beside the prompt: {controls}" if example else ", without a control"
    return f"""\
---
base_model: {settings["base_model"]}
library_name: diffusers
tags: [ctrl_rl, lora, text-to-image]
---
# {run.run.path.name}

{settings["pipeline"]} `{settings["base_model"]}`{what}.
Trained by soft reinforcement learning (CTRL, arXiv 2406.12120) with `ctrl_rl`.

```python
from ctrl_rl import ControlledPipeline

pipeline = ControlledPipeline.from_pretrained("{where}")
image = pipeline("a cat"{control}, strength=1.0).images[0]
```

`{ADAPTERS}` by itself loads into a stock pipeline by `load_lora_weights` and gives the
trained model without a control{_READ_OUT if settings["read_out"] else ""}. The base model's
licence holds for what it draws.

| figure, nats where it has a unit | |
|---|---:|
{figures}
"""
