"""Small random models of transformers' real classes, written to disk as the hub has them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pipelines import byte_tokenizer
from safetensors.torch import save_file

SIDE = 16  # of what they look at, in pixels


def _processor(kind: str, **more: Any) -> Any:
    import transformers

    sides = {"height": SIDE, "width": SIDE}
    return getattr(transformers, kind)(**{"size": sides, "crop_size": sides, **more})


def image_classifier(folder: Path) -> Path:
    """A ViT with three labels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
        id2label={0: "cat", 1: "dog", 2: "fox"},
        label2id={"cat": 0, "dog": 1, "fox": 2},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    _processor("ViTImageProcessor").save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """A CLIP model whose tokenizer knows bytes."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shared, "vocab_size": len(tokenizer), **ends, "pad_token_id": tokenizer.pad_token_id}
    vision = {**shared, "image_size": SIDE, "patch_size": 4, "initializer_range": 0.5}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _processor("CLIPImageProcessor", size={"shortest_edge": SIDE}).save_pretrained(folder)
    return folder


class Scorer(torch.nn.Module):
    """What packages of scorers have: the mean of a channel that the prompt's length chooses."""

    @classmethod
    def from_pretrained(cls, path: str) -> "Scorer":
        if path == "nowhere":
            raise OSError("no such model")
        return cls()

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        channel = torch.tensor([len(prompt) % 3 for prompt in prompts])
        return pixels.mean((2, 3)).gather(1, channel[:, None])


def aesthetic_head(file: Path, features: int = 8) -> Path:
    """A head of five linear layers, by the published numbers of theirs."""
    torch.manual_seed(0)
    sizes = [features, 12, 6, 4, 3, 1]
    weights = {}
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        layer = torch.nn.Linear(inputs, outputs)
        weights[f"layers.{number}.weight"] = layer.weight.detach()
        weights[f"layers.{number}.bias"] = layer.bias.detach()
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)
    return file


def image_reward(folder: Path) -> Path:
    """ImageReward's weights by their published names and in their order, and BERT's tokenizer.

    Two heads of text and three of vision; what is of no use for scores is in the file too.
    """
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def draw(name: str, *shape: int, std: float) -> None:
        weights[name] = torch.randn(shape, generator=generator) * std

    def linear(name: str, inputs: int, outputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs, std=inputs**-0.5)
        draw(f"{name}.bias", outputs, std=0.1)

    def norm(name: str, width: int) -> None:
        draw(f"{name}.weight", width, std=0.1)
        weights[f"{name}.weight"] += 1
        draw(f"{name}.bias", width, std=0.1)

    # Small tokens, so that what a layer norm adds to their variance shows.
    vision, text, patch, small = 192, 128, 4, 0.02
    at = "blip.visual_encoder"
    draw(f"{at}.cls_token", 1, 1, vision, std=small)
    draw(f"{at}.pos_embed", 1, 1 + (SIDE // patch) ** 2, vision, std=small)
    draw(f"{at}.patch_embed.proj.weight", vision, 3, patch, patch, std=small)
    draw(f"{at}.patch_embed.proj.bias", vision, std=small)
    for layer in range(3):
        of = f"{at}.blocks.{layer}"
        norm(f"{of}.norm1", vision)
        linear(f"{of}.attn.qkv", vision, 3 * vision)
        linear(f"{of}.attn.proj", vision, vision)
        norm(f"{of}.norm2", vision)
        linear(f"{of}.mlp.fc1", vision, 2 * vision)
        linear(f"{of}.mlp.fc2", 2 * vision, vision)
    norm(f"{at}.norm", vision)
    at = "blip.text_encoder"
    weights[f"{at}.embeddings.position_ids"] = torch.arange(40)[None]
    draw(f"{at}.embeddings.word_embeddings.weight", len(words) + 2, text, std=small)
    draw(f"{at}.embeddings.position_embeddings.weight", 40, text, std=small)
    norm(f"{at}.embeddings.LayerNorm", text)
    for layer in range(2):
        of = f"{at}.encoder.layer.{layer}"
        for attention, inputs in (("attention", text), ("crossattention", vision)):
            linear(f"{of}.{attention}.self.query", text, text)
            linear(f"{of}.{attention}.self.key", inputs, text)
            linear(f"{of}.{attention}.self.value", inputs, text)
            linear(f"{of}.{attention}.output.dense", text, text)
            norm(f"{of}.{attention}.output.LayerNorm", text)
        linear(f"{of}.intermediate.dense", text, 2 * text)
        linear(f"{of}.output.dense", 2 * text, text)
        norm(f"{of}.output.LayerNorm", text)
    linear("blip.vision_proj", vision, 8)
    linear("blip.text_proj", text, 8)
    for number, (inputs, outputs) in zip(
        (0, 2, 4, 6, 7), pairwise([text, 12, 6, 4, 3, 1]), strict=True
    ):
        linear(f"mlp.layers.{number}", inputs, outputs)
    torch.save(weights, folder / "ImageReward.pt")
    return folder


def fitted(folder: Path, num_labels: int) -> Path:
    """A classifier of this project for colour images, with random weights."""
    from ctrl_rl.classifiers.classifier import Classifier
    from ctrl_rl.classifiers.networks import ConvolutionalClassifier

    network = ConvolutionalClassifier(channels=3, num_labels=num_labels)
    Classifier(network=network, num_labels=num_labels).save(folder)
    return folder
