"""Evaluating a policy: prior, policy and exact conditional side by side, with the gap in nats.

For every condition y (a value of each control):

- prior trajectories give log Z (estimator A), the prior's row, and, where the reward has an upper
  bound b, exact draws of the soft-optimal path law: those accepted with probability e^(r - b);
- policy trajectories give the soft return J and log Z by importance weights (estimator B);
- the policy's densities on the accepted trajectories give the evidence upper bound (EUBO).

The prior does not see y, so one set of its trajectories serves all conditions with the same prompt,
and all conditions if it has no prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.conditions import Condition
from ctrl_rl.controls import Value
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.estimators import rejection_mask
from ctrl_rl.evaluation.gap import GapReport
from ctrl_rl.evaluation.pictures import draw_table
from ctrl_rl.evaluation.quality import Judge, Quality
from ctrl_rl.evaluation.samplers import Sampler, draw_prior
from ctrl_rl.evaluation.show import as_html, as_png, in_lines
from ctrl_rl.evaluation.summary import summarise
from ctrl_rl.rewards.classifier import LabelModel

_MOST_SHOWN, _SHOWN = 4, 4  # conditions, and images of each, in a notebook


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Settings of the evaluation; `configs/evaluation/default.yaml` explains each.

    Raises:
        ConfigError: a value out of range.
    """

    prior_samples: int = 4096
    policy_samples: int = 256
    exact_samples: int = 256
    batch_size: int = 1024
    most_conditions: int = 256
    confidence: float = 0.95
    seed: int = 12345

    def conditions_of(self, process: DenoisingProcess) -> list[Condition]:
        """The conditions to measure by default: all, or a random draw by the seed."""
        return process.conditions.some(self.most_conditions, self.seed)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        least = {"prior_samples": 2, "policy_samples": 3, "exact_samples": 0}
        least |= {"batch_size": 1, "most_conditions": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(
                    f"evaluation.{name}={getattr(self, name)} must be {minimum} or more"
                )
        if not 0 < self.confidence < 1:
            raise ConfigError(f"evaluation.confidence={self.confidence} must be between 0 and 1")


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        summary: figures for `summary.json`: the policy's at the top, `prior`, `exact`, `per_label`.
        samples: for "prior", "policy" and "exact": clean samples [N, *D] of every condition, on the
            CPU; exact is missing if rejection was not possible.
        conditions: names of the conditions, such as "digit=3".
        asked: the conditions themselves.
    """

    summary: dict[str, Any]
    samples: dict[str, list[Tensor]]
    conditions: list[str]
    asked: list[Condition]

    def __repr__(self) -> str:
        return "\n  ".join([self._title, *in_lines(self.summary)])

    def _repr_html_(self) -> str:
        """For notebooks: a table, and samples of the first conditions."""
        shown = {name: parts[:_MOST_SHOWN] for name, parts in self.samples.items()}
        if not all(len(part) for part in shown.get("exact", [])):
            shown.pop("exact")  # for some conditions none was accepted
        draw = partial(
            draw_table,
            rows=shown,
            headings=self.conditions[:_MOST_SHOWN],
            title="samples",
            count=_SHOWN,
        )
        return as_html(self._title, self.summary, as_png(draw))

    @property
    def _title(self) -> str:
        number = len(self.conditions)
        return f"evaluation of {number} {'condition' if number == 1 else 'conditions'}"


def prior_log_z(process: DenoisingProcess, n: int, *, batch_size: int, seed: int) -> Tensor:
    """Log-mean-exp of the reward over n prior samples, for every condition: [conditions] nats.

    For priors without prompts.
    """
    _, sample = draw_prior(process, n, batch_size=batch_size, seed=seed)
    rewards = [_reward(process, sample, condition) for condition in process.conditions]
    return torch.stack(rewards).logsumexp(1) - math.log(n)


def evaluate(
    sampler: Sampler,
    plan: EvaluationPlan,
    *,
    heldout: Mapping[str, LabelModel] | None = None,
    conditions: Sequence[Mapping[str, Value]] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a sampler on every condition.

    Args:
        sampler: to measure, in its process.
        plan: numbers of samples, confidence, seed.
        heldout: classifiers by control that training never saw.
        conditions: such as `[{"hat": "yes"}]`; an omitted control takes its null value. None for
            every combination of labels or, if there are more, `plan.most_conditions` of them drawn
            by the plan's seed; the summary then says so.
        report: called with (conditions done, conditions in all), for a progress bar.

    Returns:
        Figures, samples and names of conditions. All rewards and gaps are in nats.

    Raises:
        ConfigError: a condition with an unknown control or value.
    """
    process = sampler.process
    with torch.no_grad():
        whole = process.conditions.size if conditions is None else len(conditions)
        conditions = _places(process, conditions, plan)
        at_once = process.execution.microbatch
        judge = Judge(process.predict, dict(heldout or {}), process.controls, at_once)
        generator = torch.Generator(device=process.kernel.scale.device).manual_seed(plan.seed)
        report(0, len(conditions))
        gaps: list[GapReport] = []
        rows: dict[str, list[Quality]] = {"prior": [], "policy": [], "exact": []}
        rewards: dict[str, list[float]] = {"prior": [], "policy": [], "exact": []}
        samples: dict[str, list[Tensor]] = {"prior": [], "policy": [], "exact": []}
        kl: list[float] = []
        bound = process.reward_upper_bound if plan.exact_samples else None
        prompt: float | None = None
        for index, condition in enumerate(conditions):
            if index == 0 or condition.get(keys.PROMPT) != prompt:  # ordered by prompt
                prompt = condition.get(keys.PROMPT)
                prior, prior_sample = draw_prior(
                    process,
                    plan.prior_samples,
                    batch_size=plan.batch_size,
                    seed=plan.seed,
                    prompt=prompt,
                )
            reward = _reward(process, prior_sample, condition)
            measured: dict[str, tuple[Tensor, Tensor]] = {"prior": (prior_sample, reward)}
            accepted_log_weights = None
            if bound is not None:
                mask = rejection_mask(reward, upper_bound=bound, generator=generator)
                accepted = mask.nonzero()[: plan.exact_samples, 0]
                log_ratio = sampler.log_ratio_on(prior[accepted], condition, plan.batch_size)
                if log_ratio is not None:
                    accepted_log_weights = reward[accepted] - log_ratio
                measured["exact"] = (prior_sample[accepted], reward[accepted])
            drawn = sampler.draw(
                condition,
                n=plan.policy_samples,
                batch_size=plan.batch_size,
                seed=plan.seed + 10_000 * (index + 1),  # apart from the prior's and each other
            )
            measured["policy"] = (drawn.sample, drawn.reward)
            gaps.append(
                drawn.gap(
                    prior_reward=reward,
                    accepted_log_weights=accepted_log_weights,
                    reward_upper_bound=process.reward_upper_bound,
                    confidence=plan.confidence,
                    simultaneous=len(conditions),
                )
            )
            kl.append(drawn.kl)
            for name, (sample, values) in measured.items():
                rows[name].append(judge(sample, condition))
                rewards[name].append(float(values.mean()) if len(values) else math.nan)
                samples[name].append(sample.cpu())
            report(index + 1, len(conditions))
    names = [process.conditions.name(condition) for condition in conditions]
    if not rows["exact"]:
        samples.pop("exact")
    summary = summarise(names, gaps, rows, rewards, kl, judge)
    if whole > len(names):
        in_all = None if math.isinf(whole) else whole  # None: a control is a number
        summary["conditions"] = {"measured": len(names), "in_all": in_all}
    return Evaluation(summary=summary, samples=samples, conditions=names, asked=list(conditions))


def _places(
    process: DenoisingProcess,
    conditions: Sequence[Mapping[str, Value]] | None,
    plan: EvaluationPlan,
) -> list[Condition]:
    """Conditions with a value of every control, null values included."""
    if conditions is None:
        return plan.conditions_of(process)
    checked = [process.check_control(condition, 1) for condition in conditions]
    return [{name: value.item() for name, value in each.items()} for each in checked]


def _reward(process: DenoisingProcess, sample: Tensor, condition: Mapping[str, float]) -> Tensor:
    return process.reward(sample, process.check_control(condition, len(sample)))
