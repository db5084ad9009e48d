"""Pretrained models of transformers as judges of images, by folder or id on the hub."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ctrl_rl.assets import resolve, unreachable
from ctrl_rl.errors import ConfigError, check_choice
from ctrl_rl.pixels import check_images

_KINDS = {
    "AutoModelForImageClassification": "an image classifier of transformers",
    "CLIPModel": "a CLIP model",
}
_TRIED = ((256, 256), (440, 440), (320, 480))  # heights and widths, in pixels
# Largest difference of a smooth picture, in units of a channel's standard deviation: rounding and
# other weights of interpolation give 0.02, a processor that does something else 0.5 or more.
_APART = 0.1


class Pixels(nn.Module):
    """Images as a model's own processor gives them, with a gradient.

    Resized, cropped from the middle and normalised as the processor's config says; interpolated in
    float where the processor rounds to whole pixels. On construction both are held against each
    other, as some processors do more than that.

    Args:
        processor: an image processor of transformers.
        path: of its model, for errors.

    Raises:
        ConfigError: the processor does what is not known here.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, processor: Any, path: str) -> None:
        super().__init__()
        try:
            self._read(processor)
            apart = max(self._deviation(processor, *sides) for sides in _TRIED)
        except Exception as error:  # of attributes that a processor has not, and of its own
            raise ConfigError(
                f"the image processor of {path} cannot be followed with a gradient "
                f"({type(error).__name__}: {error}); give a model with resizing, cropping and "
                "normalisation alone, such as a ViT or CLIP"
            ) from error
        if apart > _APART:
            raise ConfigError(
                f"the image processor of {path}, {type(processor).__name__}, does more than "
                "resizing, cropping and normalisation, which is all that is followed here; give "
                "another model, such as a ViT or CLIP"
            )

    def _read(self, processor: Any) -> None:
        self.size = _sides(processor.size) if processor.do_resize else None
        crops = getattr(processor, "do_center_crop", False)
        self.crop = _sides(processor.crop_size) if crops else None
        self.mode = {2: "bilinear", 3: "bicubic"}[int(processor.resample)]  # Pillow's numbers
        channels = (1, 3, 1, 1)
        normalised = processor.do_normalize
        mean = processor.image_mean if normalised else [0.0] * 3
        std = processor.image_std if normalised else [1.0] * 3
        self.register_buffer("mean", torch.tensor(mean).reshape(channels), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(channels), persistent=False)

    def _deviation(self, processor: Any, height: int, width: int) -> float:
        """How far a smooth picture comes out from the processor's own, at most."""
        rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
        smooth = torch.stack([rows * columns, rows.expand(-1, width), 1 - rows * columns])
        pixels = (smooth * 255).round()
        array = pixels.permute(1, 2, 0).to(torch.uint8).numpy()
        theirs = processor(images=[array], return_tensors="pt")["pixel_values"]
        ours = self(pixels[None] / 127.5 - 1)
        return math.inf if ours.shape != theirs.shape else float((ours - theirs).abs().max())

    def forward(self, sample: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] of images [B, 1 or 3, H, W] in [-1, 1].

        Raises:
            ConfigError: the samples are no images.
        """
        check_images(sample.shape[1:], "a pretrained reward")
        image = (sample.float() / 2 + 0.5).expand(-1, 3, -1, -1)
        if self.size is not None:
            size = self.size
            if len(size) == 1:  # the shorter side
                short = min(image.shape[-2:])
                size = tuple(size[0] * side // short for side in image.shape[-2:])
            image = functional.interpolate(image, size, mode=self.mode, antialias=True)
        if self.crop is not None:
            height, width = self.crop
            if image.shape[-2] < height or image.shape[-1] < width:
                raise ConfigError(
                    f"images of {image.shape[-2]} x {image.shape[-1]} pixels are smaller than the "
                    f"{height} x {width} that this reward looks at"
                )
            image = _centre(image, height, width)
        return (image - self.mean) / self.std


class ImageClassifier(nn.Module):
    """An image classifier of transformers as a `LabelModel`.

    Log-probabilities are those among all labels of the model, of which a control may have a part.

    Args:
        path: the model's folder, or its id on the hub.
        labels: names of the labels that the control has, in their order; None for all.
        temperature: logits are divided by it.

    Raises:
        ConfigError: no such model, or a label that it does not have.
    """

    network: Any
    chosen: Tensor

    def __init__(
        self, *, path: str, labels: Sequence[str] | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature} must be > 0")
        self.network, self.pixels = _loaded("AutoModelForImageClassification", path)
        chosen = _chosen(path, self.network.config, labels)
        self.num_labels, self.temperature = len(chosen), temperature
        self.register_buffer("chosen", torch.tensor(chosen), persistent=False)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, L] of images [B, C, H, W], in nats."""
        logits: Tensor = self.network(pixel_values=self.pixels(x)).logits
        return torch.log_softmax(logits.float() / self.temperature, 1)[:, self.chosen]


class TextClassifier(nn.Module):
    """CLIP's zero-shot classifier: which of some texts describes the image, as a `LabelModel`.

        log p(i | x) = log softmax_i( cos(image, text_i) exp(logit_scale) )

    (Radford et al. 2021, arXiv 2103.00020, sec. 3.1.) The texts are encoded once.

    Args:
        texts: one for every label, such as ["a photo of a cat", "a photo of a dog"].
        path: a CLIP model's folder, or its id on the hub.

    Raises:
        ConfigError: no such model, or fewer than two texts.
    """

    texts: Tensor

    def __init__(self, *, texts: Sequence[str], path: str) -> None:
        super().__init__()
        if isinstance(texts, str) or len(texts) < 2:
            raise ConfigError(f"texts={texts} must be a list of two or more, one for every label")
        model, self.pixels = _loaded("CLIPModel", path)
        tokens = _tokenizer(path)(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            encoded = model.text_projection(model.text_model(**tokens).pooler_output)
        self.num_labels = len(texts)
        self.scale = float(model.logit_scale.exp())
        self.register_buffer("texts", functional.normalize(encoded, dim=1), persistent=False)
        self.vision, self.projection = model.vision_model, model.visual_projection

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, L] of images [B, C, H, W], in nats."""
        image = self.projection(self.vision(pixel_values=self.pixels(x)).pooler_output)
        cosine = functional.normalize(image.float(), dim=1) @ self.texts.T
        return torch.log_softmax(self.scale * cosine, 1)


class AestheticScore(nn.Module):
    """LAION's aesthetic predictor, 1 to 10: a linear head on CLIP's image features, as a `Measure`.

    Zhao et al. (ICLR 2025, arXiv 2406.12120) ask for a score above or below 5.7, with
    `openai/clip-vit-large-patch14`.

    Args:
        head: file of the head's weights, safetensors or a torch file of plain tensors; linear
            layers without activations between them, as published.
        path: a CLIP model's folder, or its id on the hub.

    Raises:
        ConfigError: no such model, or a file that is no head for it.
    """

    differentiable = True

    def __init__(self, *, head: str, path: str) -> None:
        super().__init__()
        model, self.pixels = _loaded("CLIPModel", path)
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.head = _head(resolve(head), model.config.projection_dim)

    def forward(self, sample: Tensor) -> Tensor:
        """Scores [B] of images [B, C, H, W]."""
        image = self.projection(self.vision(pixel_values=self.pixels(sample)).pooler_output)
        score: Tensor = self.head(functional.normalize(image.float(), dim=1))[:, 0]
        return score


def _loaded(kind: str, path: str) -> tuple[Any, Pixels]:
    """A frozen model and its pixels."""
    transformers = _transformers()
    source = _source(path)
    try:
        model, loading = getattr(transformers, kind).from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    except Exception as error:  # of the hub's client, of json, of the file system
        raise unreachable("path", path, f"{_KINDS[kind]} with config.json", error) from error
    absent = sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])])
    if absent:
        raise ConfigError(
            f"path={path} is not {_KINDS[kind]}: it lacks {absent[0]} and {len(absent) - 1} more "
            "weights, which would be random; give a model that was trained for this"
        )
    # Weights mapped from a file lie at odd addresses; see `Prior`.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model.requires_grad_(False).eval(), Pixels(processor, path)


def _chosen(path: str, config: Any, labels: Sequence[str] | None) -> list[int]:
    """Places of the labels among the model's."""
    if config.num_labels < 2:
        raise ConfigError(f"path={path} has {config.num_labels} label, which is no choice")
    if labels is None:
        return list(range(config.num_labels))
    places: dict[str, list[int]] = {}
    for place, name in config.id2label.items():
        places.setdefault(name, []).append(int(place))
    for label in labels:
        check_choice(f"label of {path}", label, places)
        if len(places[label]) > 1:
            raise ConfigError(f"{path} has {len(places[label])} labels that are called '{label}'")
    return [places[label][0] for label in labels]


def _tokenizer(path: str) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(_source(path))
    except Exception as error:  # as above
        raise unreachable("path", path, "a model with a tokenizer", error) from error


def _source(path: str) -> str:
    folder = resolve(path)
    return str(folder) if folder.is_dir() else path


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            'a pretrained reward needs a package that is not here: pip install "ctrl-rl[pipelines]"'
        ) from error
    return transformers


def _head(file: Path, features: int) -> nn.Sequential:
    """Linear layers in the order of their numbers."""
    if not file.is_file():
        raise ConfigError(
            f"head={file} is no file; give the weights of LAION's aesthetic predictor for this "
            "CLIP model, such as sac+logos+ava1-l14-linearMSE"
        )
    try:
        weights = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, weights_only=True, map_location="cpu")
        )
        ends = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
        layers = []
        # "layers.0.", "layers.2." and so on, or a single layer's bare "weight".
        for end in sorted(ends, key=lambda end: int(end.rstrip(".").rpartition(".")[2] or 0)):
            weight, bias = weights[f"{end}weight"].float(), weights[f"{end}bias"].float()
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
        head = nn.Sequential(*layers).requires_grad_(False)
        fits = head(torch.zeros(1, features)).shape == (1, 1)
    except Exception as error:  # of a broken file, of layers that do not follow each other
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"head={file} is no head for features of {features} numbers "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not fits:
        raise ConfigError(f"head={file} does not end in one score")
    return head


def _sides(size: Any) -> tuple[int, ...]:
    """Height and width, or the shorter side alone."""
    given: Mapping[str, Any] = size if isinstance(size, Mapping) else vars(size)
    if given.get("shortest_edge"):
        return (int(given["shortest_edge"]),)
    return int(given["height"]), int(given["width"])


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]
