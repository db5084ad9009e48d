"""How good samples are besides the gap: accuracy overall and per control, macro F1, diversity."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctrl_rl.conditions import joint_place, label_counts
from ctrl_rl.controls import Control
from ctrl_rl.networks.execution import in_parts
from ctrl_rl.rewards.classifier import LabelModel

_MOST_CLASSES = 65_536  # that an F1 averages over
_MOST_PAIRED = 512  # samples whose pairwise distances are averaged: 130,816 pairs


@dataclass(frozen=True)
class Quality:
    """What judges see in one set of samples of one condition.

    Attributes:
        asked: [N] index of the asked condition.
        predicted: [N] index seen by the reward's classifiers, or None.
        heldout: [N] index seen by classifiers that the agent never saw, or None.
        diversity: mean distance between two samples over sqrt(dimensions), or None for under two.
        right: by control, [N] whether the reward's classifiers see the asked label; empty if None.
        heldout_right: the same of held-out classifiers, for the controls that have one.
        partial: whether a control was left at its null label; any label of it is then right.
        numbers: by numeric control, [N] what the samples show of it; empty if unknown.
    """

    asked: Tensor
    predicted: Tensor | None
    heldout: Tensor | None
    diversity: float | None
    right: Mapping[str, Tensor] = field(default_factory=dict)
    heldout_right: Mapping[str, Tensor] = field(default_factory=dict)
    partial: bool = False
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


class Judge:
    """Judges samples by the reward's classifiers and by held-out ones.

    With several controls a sample is right if all its labels are: conditions count as joint
    classes. Accuracy per control is counted too. A control at its null label is left out of both.

    Args:
        predict: most probable labels by the reward's own classifiers, or None.
        heldout: held-out classifiers by control; they judge jointly where every control has one.
        controls: the task's controls by name; labels are judged, numbers are read.
        rows: samples per call of a classifier; None for all.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], dict[str, Tensor] | None],
        heldout: Mapping[str, LabelModel],
        controls: Mapping[str, Control],
        rows: int | None = None,
    ) -> None:
        self.predict, self.heldout = predict, heldout
        self.controls, self.sizes = dict(controls), label_counts(controls)
        self.rows = rows
        self.num_classes = math.prod(self.sizes.values())

    def __call__(self, sample: Tensor, condition: Mapping[str, float]) -> Quality:
        """Judge samples [N, *D] of `condition`."""
        given = {
            name: int(condition[name])
            for name, size in self.sizes.items()
            if condition[name] < size
        }
        n = len(sample)
        asked = {name: torch.full((n,), label) for name, label in given.items()}
        # Networks of other packages fail on no samples, which is what rejection may leave.
        some = sample if n else sample.new_zeros(1, *sample.shape[1:])
        heldout = {
            name: in_parts(model.log_probabilities, some, rows=self.rows, recompute=False)
            for name, model in self.heldout.items()
        }
        heldout = {
            name: log_probabilities[:n].argmax(1) for name, log_probabilities in heldout.items()
        }
        joint = bool(self.sizes) and set(self.heldout) == set(self.sizes)
        shown = self.predict(some)
        shown = None if shown is None else {name: values[:n] for name, values in shown.items()}
        # Numbers are shown, not predicted: with nothing but numbers there is no accuracy.
        predicted = shown if self.sizes or not self.controls else None
        return Quality(
            asked=self._joint(asked, asked, n),
            predicted=None if predicted is None else self._joint(predicted, asked, n),
            heldout=self._joint(heldout, asked, n) if joint else None,
            diversity=diversity(sample),
            right=self._right(shown or {}, asked),
            heldout_right=self._right(heldout, asked),
            partial=len(given) < len(self.sizes),
            numbers=self._numbers(shown or {}),
        )

    def combine(self, parts: Sequence[Quality]) -> dict[str, Any]:
        """Figures over several sets of samples; accuracies and F1 are shares in [0, 1].

        Accuracies per control are None for controls that nothing judges.
        """
        asked = torch.cat([part.asked for part in parts])
        figures: dict[str, Any] = {"samples": len(asked)}
        for prefix, labels in {
            "": [part.predicted for part in parts],
            "heldout_": [part.heldout for part in parts],
        }.items():
            seen = [label for label in labels if label is not None]
            if len(seen) < len(labels) or not len(asked):
                figures |= {f"{prefix}accuracy": None, f"{prefix}macro_f1": None}
                continue
            predicted = torch.cat(seen)
            # With a null value conditions are not disjoint; too many classes would fill the memory.
            partial = any(part.partial for part in parts) or self.num_classes > _MOST_CLASSES
            figures[f"{prefix}accuracy"] = float((predicted == asked).double().mean())
            figures[f"{prefix}macro_f1"] = None if partial else self._macro_f1(predicted, asked)
        for prefix, sets in {
            "": [part.right for part in parts],
            "heldout_": [part.heldout_right for part in parts],
        }.items():
            figures[f"{prefix}accuracy_per_control"] = {
                name: _share([right[name] for right in sets if name in right])
                for name in self.sizes
            }
        shown = {name for part in parts for name in part.numbers}
        if shown:
            values = {k: torch.cat([part.numbers[k] for part in parts]) for k in sorted(shown)}
            figures["shown"] = {k: _mean_and_std(value) for k, value in values.items()}
        spread = [part.diversity for part in parts if part.diversity is not None]
        figures["diversity"] = sum(spread) / len(spread) if spread else None
        return figures

    def _numbers(self, shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What samples show of the numeric controls, on the CPU."""
        return {k: v.cpu() for k, v in shown.items() if k in self.controls and k not in self.sizes}

    def _joint(self, labels: Mapping[str, Tensor], asked: Mapping[str, Tensor], n: int) -> Tensor:
        """Labels of all controls asked for as one index [N], on the CPU; 0 without any."""
        sizes = {name: size for name, size in self.sizes.items() if name in asked}
        return joint_place(sizes, labels).cpu().expand(n)

    def _right(self, seen: Mapping[str, Tensor], asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = [name for name in self.sizes if name in seen and name in asked]
        return {name: seen[name].cpu() == asked[name] for name in known}

    def _macro_f1(self, predicted: Tensor, asked: Tensor) -> float:
        from torchmetrics.functional.classification import multiclass_f1_score

        score = multiclass_f1_score(predicted, asked, num_classes=self.num_classes, average="macro")
        return float(score)


def in_words(figures: Mapping[str, Any]) -> str:
    """A judge's verdict on a row of a summary, in words; empty if there is none.

    Such as "right by a held-out judge: glasses 96 %, hat 95 %, both 92 %". Without a held-out judge
    the reward's own classifiers judge.
    """
    for prefix, judge in {"heldout_": "a held-out judge", "": "the reward's own judge"}.items():
        shares = figures[f"{prefix}accuracy_per_control"]
        said = {name.replace("_", " "): s for name, s in shares.items() if s is not None}
        if not said:
            continue
        if len(shares) == 1:
            return f"right by {judge}: {_percent(next(iter(said.values())))}"
        joint = figures[f"{prefix}accuracy"]
        if joint is not None:
            said["both" if len(shares) == 2 else "all"] = joint
        return f"right by {judge}: " + ", ".join(f"{n} {_percent(s)}" for n, s in said.items())
    return ""


def _mean_and_std(values: Tensor) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    return {"mean": float(values.double().mean()), "std": float(values.double().std())}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _share(parts: Sequence[Tensor]) -> float | None:
    right = torch.cat(list(parts)) if parts else torch.zeros(0)
    return float(right.double().mean()) if len(right) else None


def diversity(sample: Tensor) -> float | None:
    """Mean Euclidean distance between two samples over sqrt(dimensions); None for under two."""
    chosen = sample[:_MOST_PAIRED].flatten(1).float()
    if len(chosen) < 2:
        return None
    return float(torch.pdist(chosen).mean()) / math.sqrt(chosen.shape[1])
