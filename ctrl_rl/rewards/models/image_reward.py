"""ImageReward: BLIP fitted on people's rankings of images for a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_rl.assets import resolve, unreachable
from ctrl_rl.errors import ConfigError
from ctrl_rl.networks.texts import warn_of_long
from ctrl_rl.rewards.models.blip import BlipWeights
from ctrl_rl.rewards.models.loading import linear_head, source, transformers_package
from ctrl_rl.rewards.models.processors import Pixels

_FILE = "ImageReward.pt"
_HINT = f"give ImageReward's {_FILE} as published, such as by weights=zai-org/ImageReward"
_TOKENS = 35  # of a prompt, [CLS] and [SEP] included; longer ones are cut
_ADDED = 2  # rows of the word embedding, for [DEC] and [ENC], which no prompt has
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, as published


class ImageReward(nn.Module):
    """How well people would like an image for its own prompt, as a `PromptScore`.

        score = (head(text(prompt, vision(image))[0]) - 0.1672) / 1.0333

    (Xu et al. 2023, arXiv 2304.05977.) `vision` is BLIP's ViT; `text` is BLIP's BERT with
    cross-attention to all image tokens (Li et al. 2022, arXiv 2201.12086), whose first token is
    [CLS], not the [ENC] of BLIP's own matching of images and texts; `head` has only linear layers.
    Scores are standardised on the authors' data, and have no bound. Images are resized (bicubic, by
    the shorter side) and cropped to the square that the position embedding is for, 224 pixels.

    Sizes are read from the weights' shapes. Frozen, in evaluation mode, float32.

    Args:
        weights: file of the published weights, safetensors or a torch file of plain tensors; or a
            folder or an id on the hub with ImageReward.pt.
        tokenizer: folder or id of BERT's uncased tokenizer.

    Raises:
        ConfigError: no such file or tokenizer, or one that is not ImageReward's.
    """

    differentiable = True
    upper_bound: float | None = None
    tokens: Tensor
    mask: Tensor

    def __init__(self, *, weights: str, tokenizer: str = "google-bert/bert-base-uncased") -> None:
        super().__init__()
        transformers = transformers_package()
        given = BlipWeights(_found(weights), _HINT)
        self.vision = given.vision()
        self.text = given.text(self.vision.config.hidden_size, _TOKENS)
        self.head = _head(given, self.text.config.hidden_size)
        side = self.vision.config.image_size
        processor = transformers.CLIPImageProcessor(  # bicubic, with CLIP's means and deviations
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        self.pixels = Pixels(processor, weights)
        self.tokenizer = _tokenizer(transformers, tokenizer, self.text.config.vocab_size)
        for name in ("tokens", "mask"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        self.requires_grad_(False).eval()

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Tokenize the prompts, once."""
        warn_of_long(self.tokenizer, prompts, _TOKENS)
        batch = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=_TOKENS,
            return_tensors="pt",
        )
        device = self.tokens.device
        self.tokens, self.mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def forward(self, sample: Tensor, prompt: Tensor) -> Tensor:
        """Scores [B] of images [B, C, H, W] for prompts [B], indices into those read."""
        image = self.vision(pixel_values=self.pixels(sample)).last_hidden_state
        text = self.text(
            input_ids=self.tokens[prompt],
            attention_mask=self.mask[prompt],
            encoder_hidden_states=image,
        ).last_hidden_state
        score: Tensor = (self.head(text[:, 0].float())[:, 0] - _MEAN) / _STD
        return score


def _head(given: BlipWeights, features: int) -> nn.Sequential:
    """The linear layers on the first token; dropout between them is for training."""
    given.shape("mlp.layers.0.weight", 2)
    layers = {name: each for name, each in given.tensors.items() if name.startswith("mlp.layers.")}
    return linear_head(layers, features, f"weights={given.file}, by its mlp,")


def _found(weights: str) -> Path:
    """The file, fetched from the hub if it is not here."""
    path = resolve(weights)
    if path.is_dir():
        path = path / _FILE
    if path.is_file():
        return path
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(weights, _FILE))
    except Exception as error:  # from the client, the network
        what = f"a file of weights or a folder with {_FILE}"
        raise unreachable("weights", weights, what, error) from error


def _tokenizer(transformers: Any, path: str, words: int) -> Any:
    """BERT's tokenizer, for an embedding of `words` words."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source(path), trust_remote_code=False
        )
    except Exception as error:  # from the hub's client, json, the file system
        raise unreachable("tokenizer", path, "BERT's tokenizer", error) from error
    if not words - _ADDED <= len(tokenizer) <= words:
        raise ConfigError(
            f"tokenizer={path} has {len(tokenizer)} words, and the weights are for "
            f"{words - _ADDED}, besides [DEC] and [ENC]; give the one that they were trained with, "
            "google-bert/bert-base-uncased"
        )
    return tokenizer
