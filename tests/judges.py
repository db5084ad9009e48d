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


def fitted(folder: Path, num_labels: int) -> Path:
    """A classifier of this project for colour images, with random weights."""
    from ctrl_rl.classifiers.classifier import Classifier
    from ctrl_rl.classifiers.networks import ConvolutionalClassifier

    network = ConvolutionalClassifier(channels=3, num_labels=num_labels)
    Classifier(network=network, num_labels=num_labels).save(folder)
    return folder
