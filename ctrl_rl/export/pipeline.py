"""An exported run as a diffusers pipeline: the stock one, with a control beside the prompt."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import Tensor, nn

from ctrl_rl.assets import unreachable
from ctrl_rl.conditions import checked_values
from ctrl_rl.controls import Values
from ctrl_rl.errors import ConfigError, one_line
from ctrl_rl.export.schedulers import FlowSDEScheduler, scheduler_of
from ctrl_rl.export.settings import SETTINGS, controls_of, read_settings
from ctrl_rl.files import copy_file, write_tensors, write_text
from ctrl_rl.networks.embeddings import ControlEmbedding
from ctrl_rl.priors.diffusers.text_transformer import POOLED, ControlledTimeEmbedding, packed
from ctrl_rl.products import Product

EMBEDDING = "control_embedding.safetensors"
ADAPTERS = "pytorch_lora_weights.safetensors"  # what diffusers looks for
FILES = [SETTINGS, EMBEDDING, ADAPTERS, "README.md"]
EXPORT = Product(
    name="pipeline with controls",
    files=re.compile("|".join(map(re.escape, FILES))),
    told_by=SETTINGS,
    fields=frozenset({"base_model", "pipeline", "scheduler", "controls", "call"}),
)


def write_control(folder: Path, embedding: ControlEmbedding, settings: dict[str, Any]) -> None:
    """Write what a `ControlledPipeline` has besides the adapters; last what makes it one."""
    write_tensors(folder / EMBEDDING, embedding.state_dict())
    write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


class ControlledPipeline:
    """A text-to-image pipeline that also takes the controls of its training.

        pipeline = ControlledPipeline.from_pretrained("exported").to("cuda")
        images = pipeline("a cat", control={"size": 3}, strength=1.0).images

    Everything else goes to the stock pipeline's call. Scheduler, number of steps, guidance and
    negative prompt are those of training unless the call says otherwise.

    Args:
        pipeline: the stock pipeline with the adapters loaded.
        embedding: the tables of the controls.
        settings: contents of control.json.
        folder: of the adapters, for `save_pretrained`.
    """

    def __init__(
        self, pipeline: Any, embedding: ControlEmbedding, settings: dict[str, Any], folder: Path
    ) -> None:
        self.pipeline, self.embedding = pipeline, embedding
        self.settings, self.folder = settings, folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: str | None = None, **more: Any) -> Any:
        """Load what `ctrl-rl export` wrote.

        Args:
            folder: the exported folder, or its id on the hub.
            base: folder or hub id of the base model; None for the one it was trained on.
            **more: for the stock pipeline's `from_pretrained`; `dtype` defaults to training's,
                and the base model is read from safetensors, without code of its own.

        Raises:
            ConfigError: the folder is not an exported one, or a model is not available.
        """
        folder = _downloaded(folder, more)
        settings = read_settings(folder)
        kind = getattr(diffusers, settings["pipeline"])
        # The folder may be a stranger's, and so is the base model that it names.
        safe = {"use_safetensors": True, "trust_remote_code": False}
        more = {"dtype": getattr(torch, settings["dtype"]), **safe, **more}
        source = base or settings["base_model"]
        try:
            pipeline = kind.from_pretrained(source, **more)
        except Exception as error:  # of the client or a broken folder: many kinds
            raise unreachable("base", source, f"a {settings['pipeline']}", error) from error
        pipeline.scheduler = scheduler_of(settings, pipeline.scheduler.config)
        network = getattr(pipeline, settings["part"])
        with _read(folder / ADAPTERS) as adapters:
            if not any(name.startswith(f"{settings['part']}.") for name in adapters):
                raise ValueError(f"it has nothing for the {settings['part']}")  # else ignored
            network.load_lora_adapter(adapters, prefix=settings["part"])
        if settings["part"] == "unet":
            network.class_embedding = nn.Identity()  # takes a ready vector, see `TextUNet`
            features = network.time_embedding.linear_2.out_features
        else:
            network.time_text_embed = ControlledTimeEmbedding(network.time_text_embed)
            features = network.time_text_embed.features
        with _read(folder / EMBEDDING) as tables:
            embedding = ControlEmbedding(controls_of(settings), features)
            embedding.load_state_dict(tables)
        return cls(pipeline, embedding.requires_grad_(False), settings, folder)

    def to(self, *arguments: Any, **named: Any) -> "ControlledPipeline":
        """Move everything, as a stock pipeline does."""
        self.pipeline.to(*arguments, **named)
        self.embedding.to(self.pipeline.device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapters, the tables and the settings; the base model is named, not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != self.folder.resolve():
            copy_file(self.folder / ADAPTERS, folder / ADAPTERS)
        write_control(folder, self.embedding, self.settings)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        control: Mapping[str, Values] | None = None,
        strength: float = 1.0,
        **more: Any,
    ) -> Any:
        """Draw images.

        Args:
            prompt: one, or one per image; None if `prompt_embeds` are given.
            control: by control, a value for all or one per prompt, such as {"size": 3} or
                {"glasses": "yes"}; a missing control, or "any", asks for nothing.
            strength: of the control and all that was trained: 0 is the base model, 1 as trained.
            **more: for the stock pipeline's call.

        Returns:
            What the stock pipeline returns.

        Raises:
            ConfigError: an unknown control, a label out of range, a strength below 0, or neither a
                prompt nor its embeddings.
        """
        if not strength >= 0:
            raise ConfigError(f"strength={strength} must be >= 0; 0 is the base model")
        if prompt is None and more.get("prompt_embeds") is None:
            raise ConfigError("give a prompt, or prompt_embeds as the stock pipeline takes them")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        number = len(more["prompt_embeds"] if prompts is None else prompts)
        device = self.embedding.nothing.device
        values = checked_values(control or {}, controls_of(self.settings), number, device)
        trained = dict(self.settings["call"])
        if more.get("negative_prompt_embeds") is not None:
            trained.pop("negative_prompt", None)  # they replace it
        given = {**trained, **more}
        if isinstance(given.get("negative_prompt"), str):
            given["negative_prompt"] = [given["negative_prompt"]] * number
        images = given.get("num_images_per_prompt") or 1
        vectors = self.embedding(values).expand(number, -1).repeat_interleave(images, 0)
        negative = (given.get(name) for name in ("negative_prompt", "negative_prompt_embeds"))
        asked = any(each is not None for each in negative)
        separate = asked and given.get("true_cfg_scale", 1) > 1  # as in Flux
        with self._drawing(given), self._steered(vectors, strength, separate=separate):
            return self.pipeline(prompts if prompts is None else list(prompts), **given)

    @contextmanager
    def _drawing(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Give a flow scheduler the call's noise, unless it has its own."""
        scheduler = self.pipeline.scheduler
        if not isinstance(scheduler, FlowSDEScheduler) or scheduler.draw is not None:
            yield
            return
        scheduler.draw = partial(self._draw, given)
        try:
            yield
        finally:
            scheduler.draw = None

    def _draw(self, given: Mapping[str, Any], latents: Tensor) -> Tensor:
        """Noise of the call's generator, for a scheduler that gets no generator."""
        draw = partial(randn_tensor, generator=given.get("generator"), device=latents.device)
        if latents.ndim == 4:
            return draw(latents.shape)
        scale, side = self.pipeline.vae_scale_factor, self.pipeline.default_sample_size
        height, width = (given.get(name) or side * scale for name in ("height", "width"))
        sides = (2 * (side // (2 * scale)) for side in (height, width))  # as the pipeline rounds
        return packed(draw((len(latents), latents.shape[2] // 4, *sides)))

    @contextmanager
    def _steered(self, vectors: Tensor, strength: float, *, separate: bool) -> Iterator[None]:
        """For one call, add the control where the network gets the prompt, and scale its change.

        Args:
            vectors: [B, E] control embedding per image.
            strength: of the control and all that was trained.
            separate: whether guidance makes two calls, first with the prompt, instead of one.
        """
        network = getattr(self.pipeline, self.settings["part"])
        stock, calls = network.forward, itertools.count()

        def forward(*given: Any, **named: Any) -> Any:
            sample = given[0] if given else named["hidden_states"]
            nothing = next(calls) % 2 if separate else 0
            rows = vectors.to(sample) * (1 - nothing)
            if len(sample) == 2 * len(rows):  # guidance: the first half asks for nothing
                rows = torch.cat([torch.zeros_like(rows), rows])
            # A last step without noise was no action: the base model does it.
            last = self._is_last(given[1] if len(given) > 1 else named["timestep"], sample)
            weight = 0.0 if last and self.settings["read_out"] else strength
            if weight == 1:
                return stock(*given, **_controlled(named, rows))
            network.disable_adapters()
            try:
                base = stock(*given, **_controlled(named, torch.zeros_like(rows)))
            finally:
                network.enable_adapters()
            if weight == 0:
                return base
            steered = stock(*given, **_controlled(named, rows))
            mixed = base[0] + weight * (steered[0] - base[0])
            return (mixed,) if isinstance(steered, tuple) else type(steered)(sample=mixed)

        before = network.__dict__.get("forward")
        network.forward = forward
        try:
            yield
        finally:
            del network.forward
            if before is not None:
                network.forward = before

    def _is_last(self, timestep: Any, sample: Tensor) -> bool:
        """Whether the network is called for the scheduler's last step."""
        unit = 1000 if sample.ndim == 3 else 1  # Flux's pipeline gives thousandths
        asked = float(torch.as_tensor(timestep).flatten()[0]) * unit
        last = float(self.pipeline.scheduler.timesteps[-1])
        return math.isclose(asked, last, rel_tol=0.01, abs_tol=1e-6)  # bfloat16 has three digits


def _downloaded(folder: str | Path, more: Mapping[str, Any]) -> Path:
    """The folder, fetched from the hub if it is not on this machine."""
    here = Path(folder).expanduser()
    if here.is_dir() or isinstance(folder, Path):
        return here
    from huggingface_hub import snapshot_download

    client = {key: more[key] for key in ("token", "cache_dir", "local_files_only") if key in more}
    try:
        return Path(snapshot_download(folder, allow_patterns=FILES, **client))
    except Exception as error:  # from the hub's client: many kinds
        raise unreachable("folder", folder, "what `ctrl-rl export` made", error) from error


@contextmanager
def _read(file: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of an exported file; what fails with them is the file's fault."""
    try:
        yield load_file(file)
    except Exception as error:  # of safetensors, torch and peft: many kinds
        reason = one_line(error, 200)
        raise ConfigError(
            f"{file} is damaged or not of this base model ({type(error).__name__}: {reason}); "
            "export again, or fetch it again"
        ) from error


def _controlled(named: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The network's arguments with a control embedding [B, E], as its prior passes it."""
    if POOLED in named:
        return {**named, POOLED: torch.cat([named[POOLED], rows.to(named[POOLED])], dim=1)}
    return {**named, "class_labels": rows}
