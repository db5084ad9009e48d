"""Evaluating a policy: prior, policy and exact conditional side by side, with the gap in nats.

For every condition y (a label of each control):

- prior trajectories give log Z (estimator A), the prior's row, and, where the reward has an upper
  bound b, exact draws of the soft-optimal path law: those accepted with probability e^(r - b);
- policy trajectories give the soft return J and log Z by importance weights (estimator B);
- the policy's densities on the accepted trajectories give the evidence upper bound (EUBO).

The prior does not see y, so one set of its trajectories serves all conditions with the same prompt,
and all conditions where it has no prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, cat
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.conditions import Label
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.process import DenoisingProcess
from ctrl_rl.errors import ConfigError, NonFiniteError
from ctrl_rl.evaluation.bounds import Estimate
from ctrl_rl.evaluation.estimators import rejection_mask
from ctrl_rl.evaluation.gap import GapReport, average_gap_reports, gap_report
from ctrl_rl.evaluation.quality import Judge, Quality
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy
from ctrl_rl.rewards.classifier import LabelModel
from ctrl_rl.rollouts import rollout
from ctrl_rl.soft_returns import episode_kl, episode_log_ratio, episode_reward

Condition = Mapping[str, int]


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
    """What came out.

    Attributes:
        summary: figures for `summary.json`: the policy's at the top, `prior`, `exact`, `per_label`.
        samples: for "prior", "policy" and "exact": clean samples [N, *D] of every condition, on the
            CPU; exact is missing where rejection was not possible.
        conditions: names of the conditions, such as "digit=3".
    """

    summary: dict[str, Any]
    samples: dict[str, list[Tensor]]
    conditions: list[str]


def draw_prior(
    process: DenoisingProcess, n: int, *, batch_size: int, seed: int, prompt: int | None = None
) -> tuple[TensorDict, Tensor]:
    """Roll the prior out: [n, K] with latents, actions and prior means, and samples [n, *D]."""
    policy = PriorPolicy(process.kernel)
    control = None if prompt is None else {keys.PROMPT: prompt}
    kept = (keys.X, keys.STEP, keys.ACTION, keys.PRIOR_LOC, keys.SCALE)
    parts, samples = [], []
    for index, size in enumerate(_chunks(n, batch_size)):
        env = LatentEnv(
            process, num_envs=size, seed=seed + index, device=process.kernel.scale.device
        )
        episodes = rollout(env, policy, control=control)
        parts.append(episodes.select(*kept))
        samples.append(episodes[keys.SAMPLE][:, -1])  # by itself: it is a view along the steps
    return cat(parts, 0), torch.cat(samples)


def prior_log_z(process: DenoisingProcess, n: int, *, batch_size: int, seed: int) -> Tensor:
    """Log-mean-exp of the reward over n prior samples, for every condition: [conditions] nats.

    For priors without prompts.
    """
    _, sample = draw_prior(process, n, batch_size=batch_size, seed=seed)
    rewards = [_reward(process, sample, condition) for condition in process.conditions]
    return torch.stack(rewards).logsumexp(1) - math.log(n)


def evaluate(
    process: DenoisingProcess,
    policy: DenoisingPolicy,
    plan: EvaluationPlan,
    *,
    heldout: Mapping[str, LabelModel] | None = None,
    conditions: Sequence[Mapping[str, Label]] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a policy on every condition.

    Args:
        process: the MDP.
        policy: what is measured.
        plan: numbers of samples, confidence, seed.
        heldout: classifiers by control that training never saw.
        conditions: what is asked for, such as `[{"hat": "yes"}]`; a control that is left out is at
            its null label. None for every combination of labels, or `plan.most_conditions` of them
            drawn by the plan's seed where there are more; the summary then says so.
        report: called with (conditions done, conditions in all), for a progress bar.

    Returns:
        Figures, samples and names of conditions. All rewards and gaps are in nats.

    Raises:
        ConfigError: a condition with a control or a label that does not exist.
    """
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
        prompt: int | None = None
        for index, condition in enumerate(conditions):
            if index == 0 or condition.get(keys.PROMPT) != prompt:  # they come prompt by prompt
                prompt = condition.get(keys.PROMPT)
                prior, prior_sample = draw_prior(
                    process,
                    plan.prior_samples,
                    batch_size=plan.batch_size,
                    seed=plan.seed,
                    prompt=prompt,
                )
            reward = _reward(process, prior_sample, condition)
            found: dict[str, tuple[Tensor, Tensor]] = {"prior": (prior_sample, reward)}
            accepted_log_weights = None
            if bound is not None:
                mask = rejection_mask(reward, upper_bound=bound, generator=generator)
                accepted = mask.nonzero()[: plan.exact_samples, 0]
                log_ratio = _log_ratio_on(prior[accepted], policy, condition, plan.batch_size)
                accepted_log_weights = reward[accepted] - log_ratio
                found["exact"] = (prior_sample[accepted], reward[accepted])
            episodes, policy_sample = _roll_policy(process, policy, condition, plan, index)
            policy_reward = episode_reward(episodes)
            if not torch.isfinite(policy_reward).all():
                named = process.conditions.name(condition)
                raise NonFiniteError(f"the policy's reward is not finite for {named}")
            found["policy"] = (policy_sample, policy_reward)
            gaps.append(
                gap_report(
                    policy_reward=policy_reward,
                    policy_kl=episode_kl(episodes),
                    policy_log_ratio=episode_log_ratio(episodes),
                    prior_reward=reward,
                    accepted_log_weights=accepted_log_weights,
                    reward_upper_bound=process.reward_upper_bound,
                    confidence=plan.confidence,
                    simultaneous=len(conditions),
                )
            )
            kl.append(float(episode_kl(episodes).mean()))
            for name, (sample, values) in found.items():
                rows[name].append(judge(sample, condition))
                rewards[name].append(float(values.mean()) if len(values) else math.nan)
                samples[name].append(sample.cpu())
            report(index + 1, len(conditions))
    names = [process.conditions.name(condition) for condition in conditions]
    if not rows["exact"]:
        samples.pop("exact")
    summary = _summarise(names, gaps, rows, rewards, kl, judge)
    if whole > len(names):
        summary["conditions"] = {"measured": len(names), "in_all": whole}
    return Evaluation(summary=summary, samples=samples, conditions=names)


def _places(
    process: DenoisingProcess,
    conditions: Sequence[Mapping[str, Label]] | None,
    plan: EvaluationPlan,
) -> list[dict[str, int]]:
    """Conditions with the place of every label, null labels included."""
    if conditions is None:
        return process.conditions.some(plan.most_conditions, plan.seed)
    checked = [process.check_control(condition, 1) for condition in conditions]
    return [{name: int(label) for name, label in each.items()} for each in checked]


def _reward(process: DenoisingProcess, sample: Tensor, condition: Condition) -> Tensor:
    reward = process.reward(sample, process.check_control(condition, len(sample)))
    if not torch.isfinite(reward).all():
        named = process.conditions.name(condition)
        raise NonFiniteError(f"the reward of samples of the prior is not finite for {named}")
    return reward


def _roll_policy(
    process: DenoisingProcess,
    policy: DenoisingPolicy,
    condition: Condition,
    plan: EvaluationPlan,
    index: int,
) -> tuple[TensorDict, Tensor]:
    parts, samples = [], []
    for chunk, size in enumerate(_chunks(plan.policy_samples, plan.batch_size)):
        seed = plan.seed + 10_000 * (index + 1) + chunk  # apart from the prior's and each other
        env = LatentEnv(process, num_envs=size, seed=seed, device=process.kernel.scale.device)
        episodes = rollout(env, policy, control=condition)
        parts.append(episodes.select(keys.NEXT_REWARD, keys.KL, keys.LOG_RATIO))
        samples.append(episodes[keys.SAMPLE][:, -1])
    return cat(parts, 0), torch.cat(samples)


def _log_ratio_on(
    prior: TensorDict, policy: DenoisingPolicy, condition: Condition, batch_size: int
) -> Tensor:
    """Sum over steps of log pi - log p_ref on given trajectories [n, K]: [n] nats."""
    if not len(prior):  # nothing was accepted; of images there is no reshape to nothing
        return prior[keys.X].new_zeros(0)
    ratios = []
    for part in prior.reshape(-1).split(batch_size, 0):
        x, prior_loc = part[keys.X], part[keys.PRIOR_LOC]
        label = {name: torch.full((len(x),), y, device=x.device) for name, y in condition.items()}
        loc = policy.loc(x, part[keys.STEP], label, prior_loc)
        ratios.append(gaussian.log_ratio(part[keys.ACTION], loc, prior_loc, part[keys.SCALE]))
    return torch.cat(ratios).reshape(prior.batch_size).sum(1)


def _chunks(n: int, size: int) -> list[int]:
    whole, rest = divmod(n, size)
    return [size] * whole + ([rest] if rest else [])


def _summarise(
    names: list[str],
    gaps: list[GapReport],
    rows: dict[str, list[Quality]],
    rewards: dict[str, list[float]],
    kl: list[float],
    judge: Judge,
) -> dict[str, Any]:
    """Figures in all and per condition, in the layout of summary.json."""
    overall = average_gap_reports(gaps, names)

    def table(indices: list[int], gap: GapReport) -> dict[str, Any]:
        def row(name: str) -> dict[str, Any]:
            chosen = [rows[name][i] for i in indices]
            return {"reward": _mean([rewards[name][i] for i in indices]), **judge.combine(chosen)}

        log_z = gap.log_z.value
        prior, policy = row("prior"), row("policy")
        exact = row("exact") if rows["exact"] else None
        if exact is not None and exact["reward"] is not None:
            exact |= {"kl_nats": exact["reward"] - log_z, "log_z": log_z, "gap_nats": 0.0}
        return {
            **_gap_figures(gap),
            "kl_nats": _mean([kl[i] for i in indices]),
            **policy,
            "prior": prior | {"kl_nats": 0.0, "log_z": log_z, "gap_nats": log_z - prior["reward"]},
            "exact": exact,
        }

    return {
        **table(list(range(len(names))), overall),
        "contradictions": list(overall.contradictions),
        "per_label": {name: table([i], gaps[i]) for i, name in enumerate(names)},
    }


def _gap_figures(gap: GapReport) -> dict[str, Any]:
    def interval(estimate: Estimate | None) -> list[float] | None:
        return None if estimate is None else [estimate.low, estimate.high]

    return {
        "soft_return": gap.soft_return.value,
        "soft_return_ci": interval(gap.soft_return),
        "log_z": gap.log_z.value,
        "log_z_ci": interval(gap.log_z),
        "log_z_prior": gap.log_z_prior.value,
        "log_z_policy": gap.log_z_policy.value,
        "gap_nats": gap.gap.value,
        "gap_nats_ci": interval(gap.gap),
        "gap_nats_certified": gap.gap_certified,
        "eubo_gap_nats": None if gap.eubo_gap is None else gap.eubo_gap.value,
        "eubo_gap_nats_ci": interval(gap.eubo_gap),
        "ess": gap.effective_sample_size,
    }


def _mean(values: list[float]) -> float | None:
    return None if any(math.isnan(v) for v in values) else sum(values) / len(values)
