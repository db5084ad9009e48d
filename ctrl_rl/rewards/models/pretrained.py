"""Pretrained models of transformers as judges of images, by folder or hub id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctrl_rl.assets import resolve, unreachable
from ctrl_rl.controls import distinct
from ctrl_rl.errors import ConfigError, check_choice
from ctrl_rl.networks.texts import warn_of_long
from ctrl_rl.rewards.models.loading import linear_head, read_weights, source, transformers_package
from ctrl_rl.rewards.models.processors import Pixels

_KINDS = {
    "AutoModelForImageClassification": "an image classifier of transformers",
    "CLIPModel": "a CLIP model",
}


class ImageClassifier(nn.Module):
    """An image classifier of transformers as a `LabelModel`.

    Log-probabilities are over all labels of the model; a control may use only some of them.

    Args:
        path: the model's folder, or its id on the hub.
        labels: names of the control's labels, in order; None for all.
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
        called = {int(place): name for place, name in self.network.config.id2label.items()}
        self.label_names = distinct([called[place] for place in chosen])
        self.register_buffer("chosen", torch.tensor(chosen), persistent=False)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, L] of images [B, C, H, W], in nats."""
        logits: Tensor = self.network(pixel_values=self.pixels(x)).logits
        return torch.log_softmax(logits.float() / self.temperature, 1)[:, self.chosen]


class TextClassifier(nn.Module):
    """CLIP's zero-shot classifier: which of several texts describes the image, as a `LabelModel`.

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
        self.num_labels, self.label_names = len(texts), distinct(texts)
        self.scale = float(model.logit_scale.exp())
        self.register_buffer(
            "texts", _encoded(model, _tokenizer("path", path), texts), persistent=False
        )
        self.vision, self.projection = model.vision_model, model.visual_projection

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, L] of images [B, C, H, W], in nats."""
        image = self.projection(self.vision(pixel_values=self.pixels(x)).pooler_output)
        cosine = functional.normalize(image.float(), dim=1) @ self.texts.T
        return torch.log_softmax(self.scale * cosine, 1)


class ClipScore(nn.Module):
    """How well an image fits its own prompt according to CLIP, as a `PromptScore`.

        score = cos(image, prompt) exp(logit_scale)

    The published weights have exp(logit_scale) = 100, so it is CLIPScore times 40 (Hessel et
    al. 2021, arXiv 2104.08718, with w = 2.5 and without its clipping at 0). PickScore (Kirstain et
    al. 2023, arXiv 2305.01569) and HPS v2 (Wu et al. 2023, arXiv 2306.09341) are this formula with
    CLIP models fine-tuned on people's choices; tables of the latter have the cosine in per cent.

    Args:
        path: a CLIP model's folder, or its id on the hub.
        processor: folder or id of its image processor and tokenizer; None for the model's own.

    Raises:
        ConfigError: no such model.
    """

    differentiable = True
    texts: Tensor

    def __init__(self, *, path: str, processor: str | None = None) -> None:
        super().__init__()
        model, self.pixels = _loaded("CLIPModel", path, processor)
        self.upper_bound = self.scale = float(model.logit_scale.exp())
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.register_buffer("texts", torch.zeros(0), persistent=False)
        # Needed only until the prompts are known: not a part of this module.
        tokenizer = _tokenizer("path" if processor is None else "processor", processor or path)
        self._text = [(model, tokenizer)]

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Encode the prompts, once; the text encoder is not kept."""
        self.texts = _encoded(*self._text.pop(), prompts).to(self.texts.device)

    def forward(self, sample: Tensor, prompt: Tensor) -> Tensor:
        """Scores [B] of images [B, C, H, W] for prompts [B], indices into those read."""
        image = self.projection(self.vision(pixel_values=self.pixels(sample)).pooler_output)
        cosine = (functional.normalize(image.float(), dim=1) * self.texts[prompt]).sum(1)
        score: Tensor = self.scale * cosine
        return score


class AestheticScore(nn.Module):
    """LAION's aesthetic predictor, 1 to 10: a linear head on CLIP's image features, as a `Measure`.

    Zhao et al. (ICLR 2025, arXiv 2406.12120) ask for a score above or below 5.7, with
    `openai/clip-vit-large-patch14`.

    Args:
        head: file of the head's weights, safetensors or a torch file of plain tensors; linear
            layers without activations between them, as published.
        path: a CLIP model's folder, or its id on the hub.

    Raises:
        ConfigError: no such model, or a file that is not a head for it.
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


def _loaded(kind: str, path: str, processor: str | None = None) -> tuple[Any, Pixels]:
    """A frozen model and its pixels, by its own processor or another path's."""
    transformers = transformers_package()
    try:
        model, loading = getattr(transformers, kind).from_pretrained(
            source(path),
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # from the hub's client, json, the file system
        raise unreachable("path", path, f"{_KINDS[kind]} with config.json", error) from error
    name, where = ("path", path) if processor is None else ("processor", processor)
    try:
        images = transformers.AutoImageProcessor.from_pretrained(
            source(where), trust_remote_code=False
        )
    except Exception as error:  # as above
        raise unreachable(name, where, "an image processor", error) from error
    absent = sorted([*loading["missing_keys"], *map(str, loading["mismatched_keys"])])
    if absent:
        raise ConfigError(
            f"path={path} is not {_KINDS[kind]}: it lacks {absent[0]} and {len(absent) - 1} more "
            "weights, which would be random; give a model that was trained for this"
        )
    # Weights mapped from a file lie at odd addresses; see `Prior`.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model.requires_grad_(False).eval(), Pixels(images, where)


def _chosen(path: str, config: Any, labels: Sequence[str] | None) -> list[int]:
    """Indices of the labels among the model's."""
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


def _tokenizer(setting: str, path: str) -> Any:
    try:
        return transformers_package().AutoTokenizer.from_pretrained(
            source(path), trust_remote_code=False
        )
    except Exception as error:  # as above
        raise unreachable(setting, path, "a model with a tokenizer", error) from error


def _encoded(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """CLIP's features [P, E] of texts, of length 1."""
    warn_of_long(tokenizer, texts)
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        encoded = model.text_projection(model.text_model(**tokens).pooler_output)
    return functional.normalize(encoded, dim=1)


def _head(file: Path, features: int) -> nn.Sequential:
    """Linear layers in the order of their numbers."""
    if not file.is_file():
        raise ConfigError(
            f"head={file} is no file; give the weights of LAION's aesthetic predictor for this "
            "CLIP model, such as sac+logos+ava1-l14-linearMSE"
        )
    return linear_head(read_weights("head", file), features, f"head={file}")
