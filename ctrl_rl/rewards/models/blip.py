"""BLIP's encoders from transformers, with weights by the names of BLIP's authors."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards.models.loading import read_weights, transformers_package

_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."
# Parts of transformers' image encoder, and what the file calls them.
_RENAMED = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "post_layernorm": "norm",
}


class BlipWeights:
    """Weights of a file, and their encoders, whose sizes come from the weights' shapes.

    Args:
        file: an existing one; names for these encoders begin with "blip.".
        hint: how to get the right file, for errors.

    Attributes:
        tensors: all of the file, by name.

    Raises:
        ConfigError: it cannot be read; in any method, it does not fit such a network.
    """

    def __init__(self, file: Path, hint: str) -> None:
        self.file, self.hint = file, hint
        self.tensors = read_weights("weights", file)

    def vision(self) -> Any:
        """The image encoder: pixels [B, 3, side, side] to tokens [B, 1 + patches, width]."""
        transformers = transformers_package()
        width, _, _, patch = self.shape(f"{_VISION}patch_embed.proj.weight", 4)
        _, positions, _ = self.shape(f"{_VISION}pos_embed", 3)
        patches = positions - 1  # the remaining one is the class token's
        side = math.isqrt(max(patches, 0))
        if side == 0 or side * side != patches:
            raise self._refusal(f"{_VISION}pos_embed is for {patches} patches, which is no square")
        config = transformers.BlipVisionConfig(
            hidden_size=width,
            intermediate_size=self.shape(f"{_VISION}blocks.0.mlp.fc1.weight", 2)[0],
            num_hidden_layers=self._depth(f"{_VISION}blocks."),
            num_attention_heads=self._heads(width),
            image_size=side * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,  # BLIP's own; transformers' default differs
        )
        return self._filled(lambda: transformers.BlipVisionModel(config), _published)

    def text(self, image_width: int, length: int) -> Any:
        """The text encoder with cross-attention to image tokens.

        Args:
            image_width: numbers in an image token.
            length: tokens for which it must have positions.
        """
        transformers = transformers_package()
        words, width = self.shape(f"{_TEXT}embeddings.word_embeddings.weight", 2)
        positions, _ = self.shape(f"{_TEXT}embeddings.position_embeddings.weight", 2)
        if positions < length:
            raise self._refusal(f"it has positions for {positions} tokens, not for {length}")
        layers = f"{_TEXT}encoder.layer."
        config = transformers.BlipTextConfig(
            vocab_size=words,
            hidden_size=width,
            encoder_hidden_size=image_width,
            intermediate_size=self.shape(f"{layers}0.intermediate.dense.weight", 2)[0],
            num_hidden_layers=self._depth(layers),
            num_attention_heads=self._heads(width),
            max_position_embeddings=positions,
            layer_norm_eps=1e-12,
            is_decoder=True,  # for cross-attention; attention is causal only where a call asks
        )
        kind = transformers.models.blip.modeling_blip_text.BlipTextModel
        model = self._filled(lambda: kind(config, add_pooling_layer=False), _TEXT.__add__)
        model.embeddings.position_ids = torch.arange(positions)[None]  # is in no file
        return model

    def _filled(self, make: Callable[[], Any], published: Callable[[str], str]) -> Any:
        """A network with these weights in float32, copied as they may be mapped from the file."""
        with torch.device("meta"):  # random weights of this size take seconds, and are not kept
            network = make()
        filled = {}
        for name, empty in network.state_dict().items():
            tensor = self.tensors[self._named(published(name))]
            if tensor.shape != empty.shape:
                raise self._refusal(
                    f"{published(name)} has shape {tuple(tensor.shape)}, where the others ask for "
                    f"{tuple(empty.shape)}"
                )
            filled[name] = tensor.to(torch.float32, copy=True)
        network.load_state_dict(filled, assign=True)
        return network

    def _named(self, name: str) -> str:
        if name not in self.tensors:
            raise self._refusal(f"it lacks {name}")
        return name

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor, which must exist and have that many dimensions."""
        shape = tuple(self.tensors[self._named(name)].shape)
        if len(shape) != dimensions:
            raise self._refusal(f"{name} has shape {shape}, not {dimensions} dimensions")
        return shape

    def _depth(self, prefix: str) -> int:
        rests = [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]
        numbers = [rest.partition(".")[0] for rest in rests]
        return 1 + max(int(number) for number in numbers if number.isdecimal())

    def _heads(self, width: int) -> int:
        """Shapes do not tell: ViT and BERT have 64 numbers per head in all published sizes."""
        heads = max(width // 64, 1)
        if width % heads:
            raise self._refusal(f"its width of {width} is no multiple of 64, that of a head")
        return heads

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(f"weights={self.file} do not fit: {why}; {self.hint}")


def _published(name: str) -> str:
    """The file's name for a weight of transformers' image encoder."""
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return _VISION + name
