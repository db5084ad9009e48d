"""A LoRA from elsewhere is loaded as the stock pipeline loads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loras import FILE, means, prior_of, stock, trained_by_diffusers
from pipelines import MAKERS
from safetensors.torch import load_file, save_file
from torch import Tensor


def fused(base: Path, lora: Path, folder: Path) -> Path:
    """The stock pipeline with the LoRA in its weights."""
    pipeline = stock(base)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "metadata"), [*((kind, True) for kind in sorted(MAKERS)), ("sd", False)]
)
def test_the_policys_mean_is_that_of_the_stock_pipeline_with_the_lora(
    kind: str, metadata: bool, lora_bases: Any, tmp_path: Path
) -> None:
    base = lora_bases(kind)
    lora = trained_by_diffusers(base, tmp_path / "lora", metadata=metadata)
    whole = prior_of(kind, fused(base, lora, tmp_path / "fused"))
    expected, prior = means(whole), prior_of(kind, base)
    before = means(prior)
    found = means(prior, lora)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3
    assert torch.equal(means(prior), before)  # others see nothing of it


def as_trl(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that TRL's DDPO writes."""
    halves = {"lora_A": "lora.down", "lora_B": "lora.up"}
    return {
        key.replace(half, halves[half]): weight
        for key, weight in weights.items()
        for half in halves
        if half in key
    }


def as_kohya(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of sd-scripts, with an alpha of half the rank."""
    renamed = {}
    for key, weight in as_trl(weights).items():
        path, _, half = key.removeprefix("unet.").rpartition(".lora.")
        name = f"lora_unet_{path.replace('.', '_')}"
        renamed[f"{name}.lora_{half}"] = weight
        renamed[f"{name}.alpha"] = torch.tensor(1.0)
    return renamed


@pytest.mark.parametrize("names", [as_trl, as_kohya])
def test_other_names_of_the_weights_mean_what_they_mean_to_diffusers(
    names: Any, lora_bases: Any, tmp_path: Path
) -> None:
    base, targets = lora_bases("sd"), ["to_q", "to_v"]
    lora = trained_by_diffusers(base, tmp_path / "lora", metadata=False, target_modules=targets)
    plain = means(prior_of("sd", base), lora)
    save_file(names(load_file(lora / FILE)), lora / FILE)
    whole = prior_of("sd", fused(base, lora, tmp_path / "fused"))
    found = means(prior_of("sd", base), lora)
    torch.testing.assert_close(found, means(whole), rtol=1e-4, atol=1e-5)
    assert torch.allclose(found, plain, atol=1e-6) == (names is as_trl)
