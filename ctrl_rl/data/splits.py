"""Cutting labelled examples into splits that share no example."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ctrl_rl.data.offline import OfflineDataset, check_examples
from ctrl_rl.errors import ConfigError

# Half of the data for the reward; the held-out judge and the evaluation get equal shares, and one
# scalar (the temperature) needs little data. A choice of this project, not of the paper.
DEFAULT_FRACTIONS: Mapping[str, float] = MappingProxyType(
    {"train": 0.5, "heldout": 0.2, "calibration": 0.1, "evaluation": 0.2}
)
_SEEDS = 2**32  # of NumPy's legacy generator, which scikit-learn uses


def stratified_dataset(
    x: Tensor,
    labels: Tensor,
    fractions: Mapping[str, float],
    seed: int,
    label_names: Sequence[str] = (),
    where: Callable[[int], str] = "row {}".format,
) -> OfflineDataset:
    """Assigns every row to one split; each split keeps the label frequencies of the whole.

    Equal examples go to the same split, so that none is both fitted and measured on. Shares are
    those of different examples.

    Args:
        x: Examples, as `OfflineDataset` has them.
        labels: Class indices, int64 [N].
        fractions: Share of each split; the shares add up to 1.
        seed: Seed of the splits.
        label_names: Names of the classes, in order; none if they are numbers.
        where: What messages call a row.

    Raises:
        ConfigError: If the fractions cannot be met, the names do not tell the classes apart, or
            equal examples have different labels.
    """
    from sklearn.model_selection import train_test_split

    _check_settings(fractions, seed)
    num_labels = int(labels.max()) + 1
    check_examples(x, labels, num_labels, label_names)
    first = _first_of_equals(x)
    _check_labels_agree(first, labels, label_names, where)
    rest = np.unique(first)
    number = len(rest)
    *first_names, last_name = fractions
    parts: dict[str, np.ndarray] = {}
    for name in first_names:
        try:
            parts[name], rest = train_test_split(
                rest,
                train_size=round(fractions[name] * number),
                stratify=labels[rest].numpy(),
                random_state=seed,
            )
        except ValueError as error:
            raise ConfigError(
                f"cannot cut a stratified split {name!r} from {number} different examples "
                f"({error}): every label needs examples in every split, so add data or use fewer "
                "splits"
            ) from error
    parts[last_name] = rest
    return OfflineDataset(
        x=x,
        labels=labels,
        num_labels=num_labels,
        splits={
            name: torch.from_numpy(np.flatnonzero(np.isin(first, rows)))
            for name, rows in parts.items()
        },
        label_names=tuple(label_names),
    )


def _check_settings(fractions: Mapping[str, float], seed: int) -> None:
    if min(fractions.values(), default=0) <= 0 or not math.isclose(sum(fractions.values()), 1):
        raise ConfigError(
            f"fractions are {dict(fractions)}, but must be above 0 and add up to 1: adjust them"
        )
    if not 0 <= seed < _SEEDS:
        raise ConfigError(f"seed={seed} of the splits must be 0 to {_SEEDS - 1}")


def _first_of_equals(x: Tensor) -> np.ndarray:
    """For every row, the number [N] of the first row that equals it."""
    known: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in x.numpy())
    return np.array([known.setdefault(digest, row) for row, digest in enumerate(digests)])


def _check_labels_agree(
    first: np.ndarray, labels: Tensor, label_names: Sequence[str], where: Callable[[int], str]
) -> None:
    odd = np.flatnonzero(labels.numpy() != labels[first].numpy())
    if len(odd):
        row, other = int(odd[0]), int(first[odd[0]])
        given = [int(labels[each]) for each in (other, row)]
        named = [label_names[label] if label_names else label for label in given]
        raise ConfigError(
            f"{where(other)} and {where(row)} are the same example with different labels, "
            f"{named[0]!r} and {named[1]!r}: correct one label, or remove one of them"
        )
