"""Labels as people write them, as class indices."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl_rl.controls import check_label_names
from ctrl_rl.data.pictures import Picture
from ctrl_rl.errors import ConfigError, check_sizes, did_you_mean

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")  # so that it fits int64


def class_indices(
    pictures: Sequence[Picture], num_labels: int | None, label_names: Sequence[str]
) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices of labelled pictures, and the names of the classes.

    Whole labels are indices. Other labels are names: sorted, or in the order of `label_names`.

    Args:
        pictures: The pictures, one or more.
        num_labels: K, to check that no class is missing; None for as many as there are.
        label_names: Names of the K classes, in order; none to take them from the labels.

    Returns:
        Indices int64 [N], each of 0 to K - 1 at least once, and K names; no names if labels are
        whole and none were given.

    Raises:
        ConfigError: If a label is missing, unknown or neither whole nor a name, or no picture has
            one of the K classes.
    """
    if num_labels is not None:
        check_sizes("dataset", num_labels=num_labels)
    texts = [picture.label.strip() for picture in pictures]
    for picture, text in zip(pictures, texts, strict=True):
        if not text:
            raise ConfigError(f"{picture.where} has no label: give it one, or remove it")
    names = tuple(label_names)
    check_label_names("dataset.label_names", names, num_labels or len(names))
    whole = [int(text) for text in texts if _WHOLE.fullmatch(text)]
    all_whole = len(whole) == len(texts)
    if all_whole and (not names or 0 <= min(whole) <= max(whole) < len(names)):
        indices = whole
    else:
        names = names or _names_in(pictures, texts)
        places = {name: place for place, name in enumerate(names)}
        for picture, text in zip(pictures, texts, strict=True):
            if text not in places:
                raise ConfigError(
                    f"{picture.where} has the label {text!r}, which dataset.label_names lacks; "
                    f"{did_you_mean(text, names)}"
                )
        indices = [places[text] for text in texts]
    _check_used(pictures, indices, num_labels or len(names) or None, names)
    return torch.tensor(indices), names


def _names_in(pictures: Sequence[Picture], texts: Sequence[str]) -> tuple[str, ...]:
    """Labels that are names, sorted."""
    are_whole = [_WHOLE.fullmatch(text) is not None for text in texts]
    for picture, text, is_whole in zip(pictures, texts, are_whole, strict=True):
        if _is_number(text) and not is_whole:
            raise ConfigError(
                f"{picture.where} has the label {text!r}, but labels must be whole, 0 to K - 1, or "
                "names: correct it, or give all labels in dataset.label_names"
            )
    if any(are_whole):
        number, name = are_whole.index(True), are_whole.index(False)
        raise ConfigError(
            f"{pictures[number].where} has the label {texts[number]!r} and {pictures[name].where} "
            f"{texts[name]!r}: use whole labels or names throughout, or give all labels in "
            "dataset.label_names"
        )
    return tuple(sorted(set(texts)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_used(
    pictures: Sequence[Picture], indices: Sequence[int], given: int | None, names: Sequence[str]
) -> None:
    """Refuse indices that are not every one of 0 to K - 1; K may be far too large."""
    used = sorted(set(indices))
    number = given or used[-1] + 1
    if len(used) == number and used[0] == 0 and used[-1] == number - 1:
        return
    for picture, index in zip(pictures, indices, strict=True):
        if not 0 <= index < number:
            raise ConfigError(
                f"{picture.where} has the label {index}, but must have one of 0 to {number - 1}"
            )
    absent = next((place for place, index in enumerate(used) if place != index), len(used))
    named = repr(names[absent]) if absent < len(names) else absent
    largest = pictures[indices.index(used[-1])].where
    raise ConfigError(
        f"labels must be every one of 0 to {number - 1}, and no picture has {named}: add some"
        + ("" if given else f", or correct the largest label, of {largest}")
    )
