"""An exported run as a diffusers pipeline: the stock one, with a control beside the prompt."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrl_rl.errors import ConfigError
from ctrl_rl.labels import checked_labels
from ctrl_rl.nets import ControlEmbedding

SETTINGS, EMBEDDING = "control.json", "control_embedding.safetensors"
ADAPTERS = "pytorch_lora_weights.safetensors"  # what diffusers looks for


def write_control(folder: Path, embedding: ControlEmbedding, settings: dict[str, Any]) -> None:
    """Write what a `ControlledPipeline` has beside the adapters."""
    tables = {name: table.cpu() for name, table in embedding.state_dict().items()}
    save_file(tables, folder / EMBEDDING)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


class ControlledPipeline:
    """A Stable Diffusion pipeline that also takes a control, as trained.

        pipeline = ControlledPipeline.from_pretrained("exported").to("cuda")
        images = pipeline("a cat", control={"size": 3}, strength=1.0).images

    Everything else goes to the stock pipeline's call. Scheduler, number of steps, guidance and
    negative prompt are those of training where the call does not say otherwise.

    Args:
        pipeline: the stock pipeline with the adapters loaded.
        embedding: the tables of the controls.
        settings: what control.json holds.
        folder: where the adapters lie, for `save_pretrained`.
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
            folder: the exported folder.
            base: folder or hub id of the base model; None for the one it was trained on.
            **more: for the stock pipeline's `from_pretrained`; `dtype` is that of training.

        Raises:
            ConfigError: the folder is not an exported one.
        """
        import diffusers

        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            raise ConfigError(
                f"{folder} has no {SETTINGS}; give a folder that `ctrl-rl export` made"
            )
        settings = json.loads((folder / SETTINGS).read_text())
        kind = getattr(diffusers, settings["pipeline"])
        more = {"dtype": getattr(torch, settings["dtype"]), **more}
        pipeline = kind.from_pretrained(base or settings["base_model"], **more)
        scheduler = getattr(diffusers, settings["scheduler"])
        config = {"clip_sample": False, **pipeline.scheduler.config}  # as the run's prior has it
        pipeline.scheduler = scheduler.from_config(config)
        pipeline.unet.load_lora_adapter(load_file(folder / ADAPTERS), prefix="unet")
        pipeline.unet.class_embedding = nn.Identity()  # takes a ready vector, see `TextUNet`
        features = pipeline.unet.time_embedding.linear_2.out_features
        embedding = ControlEmbedding(settings["controls"], features)
        embedding.load_state_dict(load_file(folder / EMBEDDING))
        return cls(pipeline, embedding.requires_grad_(False), settings, folder)

    def to(self, *arguments: Any, **named: Any) -> "ControlledPipeline":
        """Move everything, as a stock pipeline moves."""
        self.pipeline.to(*arguments, **named)
        self.embedding.to(self.pipeline.device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapters, the tables and the settings; the base model is named, not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != self.folder.resolve():
            shutil.copyfile(self.folder / ADAPTERS, folder / ADAPTERS)
        write_control(folder, self.embedding, self.settings)

    def __call__(
        self,
        prompt: str | Sequence[str],
        control: Mapping[str, int | Sequence[int]] | None = None,
        strength: float = 1.0,
        **more: Any,
    ) -> Any:
        """Draw images.

        Args:
            prompt: one, or one per image.
            control: a label for all, or one per image, by name of the control; what is missing
                asks for nothing.
            strength: of the control and all that was trained: 0 is the base model, 1 as trained.
            **more: for the stock pipeline's call.

        Returns:
            What the stock pipeline returns.

        Raises:
            ConfigError: an unknown control, a label out of range, or a strength below 0.
        """
        if not strength >= 0:
            raise ConfigError(f"strength={strength} must be >= 0; 0 is the base model")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device = self.embedding.nothing.device
        labels = checked_labels(control or {}, self.settings["controls"], len(prompts), device)
        given = {**self.settings["call"], **more}
        if isinstance(given.get("negative_prompt"), str):
            given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
        images = given.get("num_images_per_prompt") or 1
        vectors = self.embedding(labels).repeat_interleave(images, 0)
        with self._steered(vectors, strength):
            return self.pipeline(prompts, **given)

    @contextmanager
    def _steered(self, vectors: Tensor, strength: float) -> Iterator[None]:
        """The UNet with the control in its asked half, and its change scaled, for one call."""
        unet = self.pipeline.unet
        stock = unet.forward

        def forward(sample: Tensor, timestep: Any, *given: Any, **named: Any) -> Any:
            named.pop("class_labels", None)
            rows = vectors.to(sample)
            if len(sample) == 2 * len(rows):  # guidance: the first half asks for nothing
                rows = torch.cat([torch.zeros_like(rows), rows])
            # Where the last step has no noise it was no action: the base model does it.
            last = int(timestep) == int(self.pipeline.scheduler.timesteps[-1])
            weight = 0.0 if last and self.settings["read_out"] else strength
            if weight == 1:
                return stock(sample, timestep, *given, class_labels=rows, **named)
            unet.disable_adapters()
            try:
                base = stock(sample, timestep, *given, class_labels=torch.zeros_like(rows), **named)
            finally:
                unet.enable_adapters()
            if weight == 0:
                return base
            found = stock(sample, timestep, *given, class_labels=rows, **named)
            mixed = base[0] + weight * (found[0] - base[0])
            return (mixed,) if isinstance(found, tuple) else type(found)(sample=mixed)

        unet.forward = forward
        try:
            yield
        finally:
            unet.forward = stock
