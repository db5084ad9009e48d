r"""The reward of CTRL: log-probability of the asked label under a classifier of clean samples.

    r(sample, y) = sum_i w_i log p_i(y_i | sample)

with one classifier per control. If the controls are independent given the sample, the sum with unit
weights is their joint log-probability (Zhao et al. 2025, arXiv 2406.12120, ex. 2), and each
classifier may come from its own data set.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ctrl_rl.controls import Categorical
from ctrl_rl.errors import ConfigError
from ctrl_rl.rewards.reward import Reward, checked_weights


class LabelModel(Protocol):
    """Anything that gives normalised log-probabilities of labels.

    Set `differentiable = False` if the result has no gradient, and `label_names`, one per label, if
    the labels have names.
    """

    num_labels: int

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities [B, num_labels] of samples [B, *D], in nats."""
        ...


class ClassifierReward(Reward):
    """Weighted sum of log-probabilities; at most 0, differentiable if all classifiers are.

    Args:
        classifiers: one calibrated classifier per named control.
        weights: weight of each control, > 0; 1 by default.
    """

    def __init__(
        self,
        *,
        classifiers: Mapping[str, LabelModel],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleDict({name: _module(model) for name, model in classifiers.items()})
        self.requires_grad_(False).eval()
        self.weights = checked_weights(weights, classifiers)
        self.controls = {
            name: Categorical.of(model.num_labels, getattr(model, "label_names", ()))
            for name, model in classifiers.items()
        }
        self.differentiable = all(
            getattr(model, "differentiable", True) for model in classifiers.values()
        )
        self.upper_bound = 0.0

    def forward(self, sample: Tensor, control: Mapping[str, Tensor]) -> Tensor:
        """Sum the weighted log-probabilities of the asked labels; a null label adds 0."""
        total = sample.new_zeros(sample.shape[0], dtype=torch.float32)
        for name, weight in self.weights.items():
            label = control[name]
            asked = ~self.controls[name].is_null(label)
            picked = torch.where(asked, label, 0)[:, None]
            log_prob = self._log_probabilities(name, sample).gather(1, picked)[:, 0]
            total = total + weight * torch.where(asked, log_prob, 0.0)
        return total

    def predict(self, sample: Tensor) -> dict[str, Tensor]:
        """Most probable label of each control."""
        return {name: self._log_probabilities(name, sample).argmax(1) for name in self.weights}

    def _log_probabilities(self, name: str, sample: Tensor) -> Tensor:
        log_probabilities: Tensor = self.models[name].log_probabilities(sample)  # type: ignore[operator]
        return log_probabilities


def _module(model: LabelModel) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"a classifier must be a torch module with log_probabilities(x) and num_labels, "
            f"got {type(model).__name__}"
        )
    return model
