"""Handwritten digits, shipped with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ctrl_rl.data.offline import OfflineDataset
from ctrl_rl.data.splits import DEFAULT_FRACTIONS, stratified_dataset


def digits_dataset(
    *, fractions: Mapping[str, float] = DEFAULT_FRACTIONS, seed: int = 0
) -> OfflineDataset:
    """The 1797 handwritten digits of scikit-learn, as 8x8 images (no download).

    Args:
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the stratified splits.

    Returns:
        A dataset with x float32 [1797, 1, 8, 8] and 10 labels, called "0" to "9".

    Raises:
        ConfigError: If the fractions cannot be met.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The pixels are ink counts from 0 to 16 (UCI "Optical Recognition of Handwritten Digits").
    x = torch.from_numpy(digits.images[:, None] / 8 - 1).float()
    labels = torch.from_numpy(digits.target).long()
    names = [str(name) for name in digits.target_names]
    return stratified_dataset(x, labels, fractions, seed, label_names=names)
