"""What an evaluation measures: samplers, which draw samples of a condition and tell their gap.

A policy is rolled out, and its densities tell how far its paths are from the soft-optimal ones. A
law draws samples in another way, for instance by rejection, and states its own soft return:
J = E[log w], where w is an unbiased estimate of Z from all that it drew for one sample. The
difference log Z - E[log w] is the KL of that whole draw from the target's, and bounds the KL of the
sample alone. A law with exact samples has J = log Z.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, cat
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.agents.parts.returns import episode_kl, episode_log_ratio, episode_reward
from ctrl_rl.controls import Values
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.bounds import Estimate
from ctrl_rl.evaluation.gap import GapReport, gap_report, law_gap_report
from ctrl_rl.evaluation.side_by_side import Strip, draw_strip
from ctrl_rl.policies import DenoisingPolicy, PriorPolicy, StrengthPolicy

_ANY_LEVEL = 0.95  # where only the value matters


class Draws(ABC):
    """Samples of one condition.

    Attributes:
        sample: [n, *D] clean samples.
        reward: [n] nats.
        kl: mean KL from the prior, nats: mean reward minus J.
    """

    sample: Tensor
    reward: Tensor
    kl: float

    @abstractmethod
    def gap(self, **common: Any) -> GapReport:
        """The gap; `common` has the arguments of `gap_report` that all samplers share."""


@dataclass(frozen=True)
class PolicyDraws(Draws):
    """Episodes of a policy: a `Draws` with summed KLs and log-ratios [n], nats."""

    sample: Tensor
    reward: Tensor
    path_kl: Tensor
    log_ratio: Tensor

    @property
    def kl(self) -> float:  # type: ignore[override]
        """Mean of the closed form."""
        return float(self.path_kl.mean())

    def gap(self, **common: Any) -> GapReport:
        """From rewards, KLs and log-ratios of the episodes."""
        return gap_report(
            policy_reward=self.reward,
            policy_kl=self.path_kl,
            policy_log_ratio=self.log_ratio,
            **common,
        )


@dataclass(frozen=True)
class LawDraws(Draws):
    """Samples of a law, and its soft return by the confidence of the interval."""

    sample: Tensor
    reward: Tensor
    soft_return: Callable[[float], Estimate]

    @property
    def kl(self) -> float:  # type: ignore[override]
        """Mean reward less J."""
        return float(self.reward.mean()) - self.soft_return(_ANY_LEVEL).value

    def gap(self, **common: Any) -> GapReport:
        """From the law's own estimate of J."""
        common.pop("accepted_log_weights")
        return law_gap_report(soft_return=self.soft_return, **common)


class Sampler(ABC):
    """Draws samples of conditions in a process.

    Args:
        process: the MDP.
    """

    def __init__(self, process: DenoisingProcess) -> None:
        self.process = process

    @property
    def policy(self) -> DenoisingPolicy:
        """The policy that draws.

        Raises:
            ConfigError: a law draws, not a policy.
        """
        raise ConfigError("this run draws by a law of whole samples, and has no policy")

    @abstractmethod
    def draw(self, condition: Mapping[str, float], *, n: int, batch_size: int, seed: int) -> Draws:
        """Draw n samples.

        Args:
            condition: a value of every control, null ones included.
            n: how many.
            batch_size: episodes at once at most.
            seed: of all randomness; those of two calls are at least 10,000 apart.
        """

    @abstractmethod
    def strip(self, control: Mapping[str, Values], *, title: str, n: int, seed: int) -> Strip:
        """Draw n samples with their latents, for pictures.

        The i-th one depends on its condition, the seed and i, not on n or the others.
        """

    def log_ratio_on(
        self, episodes: TensorDict, condition: Mapping[str, float], batch_size: int
    ) -> Tensor | None:
        """Summed log-ratio to the prior on given trajectories [n, K]: [n] nats; None without."""
        del episodes, condition, batch_size
        return None

    def at_strength(self, strength: float) -> "Sampler":
        """The same sampler with its drift scaled.

        Raises:
            ConfigError: there is no drift.
        """
        if strength == 1.0:
            return self
        raise ConfigError(
            f"strength={strength} scales the drift of a policy, and what this run draws by has "
            "none; use strength=1"
        )


class PolicySampler(Sampler):
    """Rolls out a policy.

    Args:
        process: the MDP.
        policy: trained or not.
    """

    def __init__(self, process: DenoisingProcess, policy: DenoisingPolicy) -> None:
        super().__init__(process)
        self._policy = policy

    @property
    def policy(self) -> DenoisingPolicy:
        """The policy that is rolled out."""
        return self._policy

    def draw(
        self, condition: Mapping[str, float], *, n: int, batch_size: int, seed: int
    ) -> PolicyDraws:
        """Roll out n episodes."""
        parts, samples = [], []
        for chunk, size in enumerate(chunks(n, batch_size)):
            env = self.env(size, seed + chunk)
            episodes = rollout(env, self.policy, control=condition)
            parts.append(episodes.select(keys.NEXT_REWARD, keys.KL, keys.LOG_RATIO))
            samples.append(episodes[keys.SAMPLE][:, -1])
        whole = cat(parts, 0)
        return PolicyDraws(
            sample=torch.cat(samples),
            reward=episode_reward(whole),
            path_kl=episode_kl(whole),
            log_ratio=episode_log_ratio(whole),
        )

    def strip(self, control: Mapping[str, Values], *, title: str, n: int, seed: int) -> Strip:
        """Strips of one seed have the same noise, for any policy and condition."""
        return draw_strip(self.process, self.policy, control, title=title, n=n, seed=seed)

    def log_ratio_on(
        self, episodes: TensorDict, condition: Mapping[str, float], batch_size: int
    ) -> Tensor:
        """Sum over steps of log pi - log p_ref on given trajectories [n, K]: [n] nats."""
        if not len(episodes):  # nothing was accepted; empty images cannot be reshaped
            return episodes[keys.X].new_zeros(0)
        ratios = []
        for part in episodes.reshape(-1).split(batch_size, 0):
            x, prior_loc = part[keys.X], part[keys.PRIOR_LOC]
            asked = {k: torch.full((len(x),), y, device=x.device) for k, y in condition.items()}
            loc = self.policy.loc(x, part[keys.STEP], asked, prior_loc)
            ratios.append(gaussian.log_ratio(part[keys.ACTION], loc, prior_loc, part[keys.SCALE]))
        return torch.cat(ratios).reshape(episodes.batch_size).sum(1)

    def at_strength(self, strength: float) -> "PolicySampler":
        """The policy's drift times the strength."""
        if strength == 1.0:
            return self
        return PolicySampler(self.process, StrengthPolicy(self.policy, strength))

    def env(self, num_envs: int, seed: int) -> LatentEnv:
        """A new env."""
        device = self.process.kernel.scale.device
        return LatentEnv(self.process, num_envs=num_envs, seed=seed, device=device)


def draw_prior(
    process: DenoisingProcess, n: int, *, batch_size: int, seed: int, prompt: float | None = None
) -> tuple[TensorDict, Tensor]:
    """Roll out the prior: [n, K] with latents, actions and prior means, and samples [n, *D]."""
    policy = PriorPolicy(process.kernel)
    control = None if prompt is None else {keys.PROMPT: prompt}
    kept = (keys.X, keys.STEP, keys.ACTION, keys.PRIOR_LOC, keys.SCALE)
    parts, samples = [], []
    for index, size in enumerate(chunks(n, batch_size)):
        env = LatentEnv(
            process, num_envs=size, seed=seed + index, device=process.kernel.scale.device
        )
        episodes = rollout(env, policy, control=control)
        parts.append(episodes.select(*kept))
        samples.append(episodes[keys.SAMPLE][:, -1])  # separately: it is a view along the steps
    return cat(parts, 0), torch.cat(samples)


def chunks(n: int, size: int) -> list[int]:
    """Batch sizes that add up to n, all equal but the last."""
    whole, rest = divmod(n, size)
    return [size] * whole + ([rest] if rest else [])
