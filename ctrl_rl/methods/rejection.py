r"""Rejection: whole episodes of the prior, each accepted with probability e^(r - b), b >= r.

Accepted episodes have the density p_ref(path) e^r / Z, the soft-optimal law itself: the gap is 0,
and the samples are the exact conditional's. It needs a reward with a known upper bound b, and about
e^(b - log Z) episodes of the prior for each sample, which makes training worthwhile.

The soft return is log Z. It is reported as the log-mean-exp of the rewards of the method's own
trials. The gap is then the difference of two independent estimates of one number: 0 within its
interval, or something is wrong.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import keys
from ctrl_rl.agents.parts.returns import episode_reward
from ctrl_rl.controls import Values
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.bounds import Estimate
from ctrl_rl.evaluation.estimators import log_mean_exp, rejection_mask
from ctrl_rl.evaluation.noise import generators
from ctrl_rl.evaluation.samplers import LawDraws, Sampler
from ctrl_rl.evaluation.side_by_side import Strip, denoise
from ctrl_rl.policies import PriorPolicy

_MOST_ROUNDS = 9_000  # seeds of two draws are 10,000 apart, and every round takes one


class Rejection(Sampler):
    """Exact draws.

    Args:
        process: the MDP; its reward has an upper bound.
        trials: largest number of episodes of the prior for one condition.

    Raises:
        ConfigError: no upper bound, or no trial.
    """

    def __init__(self, *, process: DenoisingProcess, trials: int = 1_000_000) -> None:
        super().__init__(process)
        if process.reward_upper_bound is None:
            raise ConfigError(
                f"method=rejection needs a reward with an upper bound, and that of "
                f"{type(process.reward_model).__name__} is not known; use "
                "method=reconstruction_guidance, or train an agent"
            )
        if trials < 1:
            raise ConfigError(f"method.trials={trials} must be 1 or more")
        self.trials = trials

    def draw(
        self, condition: Mapping[str, float], *, n: int, batch_size: int, seed: int
    ) -> LawDraws:
        """Draw until n are accepted.

        Raises:
            ConfigError: too few trials were accepted.
        """
        samples, rewards, of_trials, missing = [], [], [], n
        for episodes, reward, mask in self._rounds(condition, batch_size, seed):
            taken = mask.nonzero()[:missing, 0]
            samples.append(episodes[keys.SAMPLE][taken, -1])
            rewards.append(reward[taken])
            of_trials.append(reward)
            missing -= len(taken)
            if missing == 0:
                break
        else:
            self._refuse(n - missing, n, self.process.conditions.name(condition))
        return LawDraws(
            sample=torch.cat(samples),
            reward=torch.cat(rewards),
            soft_return=partial(_log_z, torch.cat(of_trials)),
        )

    def strip(self, control: Mapping[str, Values], *, title: str, n: int, seed: int) -> Strip:
        """Draw n episodes, the i-th under the i-th condition, by trials from the i-th stream.

        Raises:
            ConfigError: no trial was accepted for one of them.
        """
        process, bound = self.process, self.process.reward_upper_bound
        assert bound is not None  # checked before
        values, policy = process.check_control(control, n), PriorPolicy(process.kernel)
        streams = generators(seed, n, process.kernel.scale.device)
        found: dict[int, tuple[Tensor, ...]] = {}
        for _ in range(self._rounds_of(n)):
            left = [row for row in range(n) if row not in found]
            asked = {name: value[left] for name, value in values.items()}
            own = [streams[row] for row in left]
            latents, samples = denoise(process, policy, asked, own)
            with torch.no_grad():
                rewards = process.reward(samples, asked).split(1)
            for row, reward, stream, *drawn in zip(
                left, rewards, own, latents, samples, strict=True
            ):
                if rejection_mask(reward, upper_bound=bound, generator=stream).all():
                    found[row] = tuple(drawn)
            if len(found) == n:
                paths, clean = zip(*(found[row] for row in range(n)), strict=True)
                return Strip(title, torch.stack(paths), torch.stack(clean), paired=False)
        self._refuse(len(found), n, title)

    def _rounds_of(self, size: int) -> int:
        """How often `size` trials at once may be made."""
        return min(-(-self.trials // size), _MOST_ROUNDS)

    def _rounds(
        self, control: Mapping[str, Values], size: int, seed: int
    ) -> Iterator[tuple[TensorDict, Tensor, Tensor]]:
        """Episodes of the prior, their rewards and which are accepted, batch by batch."""
        process = self.process
        device, bound = process.kernel.scale.device, process.reward_upper_bound
        assert bound is not None  # checked before
        generator = torch.Generator(device=device).manual_seed(seed)
        policy = PriorPolicy(process.kernel)
        for place in range(self._rounds_of(size)):
            env = LatentEnv(process, num_envs=size, seed=seed + 1 + place, device=device)
            with torch.no_grad():
                episodes = rollout(env, policy, control=control)
            reward = episode_reward(episodes)
            yield episodes, reward, rejection_mask(reward, upper_bound=bound, generator=generator)

    def _refuse(self, taken: int, wanted: int, named: str) -> NoReturn:
        raise ConfigError(
            f"method=rejection accepted {taken} of {wanted} samples in {self.trials:,} trials for "
            f"{named}; ask for fewer, raise method.trials, or use another method"
        )


def _log_z(rewards: Tensor, confidence: float) -> Estimate:
    return log_mean_exp(rewards, confidence=confidence)
