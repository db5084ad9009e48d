"""Offline labelled data: pairs (x, y) cut into named splits that never overlap.

CTRL (arXiv 2406.12120) fits its reward on offline pairs. A figure measured on data that the
reward has seen says nothing, so the splits are part of the dataset and are checked once, here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_rl.controls import check_label_names
from ctrl_rl.errors import ConfigError, did_you_mean


def as_float(x: Tensor) -> Tensor:
    """Examples as networks expect them: float32 in [-1, 1], pixels / 127.5 - 1."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


@dataclass(frozen=True, kw_only=True, eq=False)
class OfflineDataset:
    """Labelled examples with named, disjoint splits, on the CPU.

    Attributes:
        x: Examples [N, *shape]: float32 with every value in [-1, 1], or uint8 pixels (a quarter of
            the memory), which `as_float` converts.
        labels: Class indices, int64 [N], each in [0, num_labels).
        num_labels: Number of classes.
        splits: For each split its row numbers, int64 [n], n >= 1. No row is in two splits.
        label_names: Names of the classes, in order; empty if they are numbers.

    Raises:
        ConfigError: If any of the above does not hold.
    """

    x: Tensor
    labels: Tensor
    num_labels: int
    splits: Mapping[str, Tensor]
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the examples, then the splits."""
        check_examples(self.x, self.labels, self.num_labels, self.label_names)
        self._check_splits()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch."""
        return tuple(self.x.shape[1:])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the examples, labels and splits, in hexadecimal.

        Two classifiers were fitted on disjoint data only if they name different splits of the
        same partition; equal fingerprints say that the partition is the same.
        """
        digest = hashlib.sha256(f"{self.shape} {self.num_labels}".encode())
        parts = {"x": self.x, "labels": self.labels, **dict(sorted(self.splits.items()))}
        for name, tensor in parts.items():
            digest.update(f"{name} {len(tensor)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns the examples of one split.

        Args:
            name: One of the keys of `splits`.

        Returns:
            x [n, *shape], as stored (see `as_float`), and labels int64 [n].

        Raises:
            ConfigError: If there is no such split.
        """
        if name not in self.splits:
            raise ConfigError(f"no split named {name!r}; {did_you_mean(name, self.splits)}")
        rows = self.splits[name]
        return self.x[rows], self.labels[rows]

    def _check_splits(self) -> None:
        if not self.splits:
            raise ConfigError("splits is empty: name at least one split, such as 'train'")
        owners: dict[int, str] = {}
        for name, rows in self.splits.items():
            if rows.dtype != torch.int64 or rows.dim() != 1 or len(rows) == 0:
                raise ConfigError(
                    f"split {name!r} is {rows.dtype} of shape {list(rows.shape)}, but must be "
                    "a non-empty torch.int64 [n] of row numbers: give it rows or remove it"
                )
            if rows.min() < 0 or rows.max() >= len(self.x):
                raise ConfigError(
                    f"split {name!r} names rows {rows.min()} to {rows.max()}, but x has "
                    f"rows 0 to {len(self.x) - 1}: remove the rows that do not exist"
                )
            for row in rows.tolist():
                if row in owners:
                    raise ConfigError(
                        f"row {row} is in split {owners[row]!r} and again in {name!r}, but splits "
                        "must not overlap: give each row to one split, once"
                    )
                owners[row] = name


def check_examples(
    x: Tensor, labels: Tensor, num_labels: int, label_names: Sequence[str] = ()
) -> None:
    """Refuse examples that are not as `OfflineDataset` has them.

    Raises:
        ConfigError: If one of them is not what it must be.
    """
    if x.dtype not in (torch.float32, torch.uint8) or x.dim() < 2 or x.numel() == 0:
        raise ConfigError(
            f"x is {x.dtype} of shape {list(x.shape)}, but must be a non-empty torch.float32 "
            "in [-1, 1] or torch.uint8 pixels, [N, *shape]: convert it with x.float(), "
            "examples on the first axis"
        )
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ConfigError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}, but must be "
            f"torch.int64 [{len(x)}]: give one class index per row of x"
        )
    if x.dtype == torch.float32 and not torch.isfinite(x).all():
        bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero()[:, 0]
        raise ConfigError(
            f"x holds NaN or infinite values in {len(bad)} of {len(x)} examples, first in row "
            f"{bad[0]}: remove or repair those examples"
        )
    if x.dtype == torch.float32 and x.abs().max() > 1:
        raise ConfigError(
            f"x lies in [{x.min():g}, {x.max():g}], but must lie in [-1, 1]: rescale it, for "
            "instance x / 127.5 - 1 for 8-bit images"
        )
    if labels.min() < 0 or labels.max() >= num_labels:
        raise ConfigError(
            f"labels lie in [{labels.min()}, {labels.max()}], but num_labels={num_labels} allows "
            f"0 to {num_labels - 1}: renumber the labels"
        )
    check_label_names("label_names", label_names, num_labels)
