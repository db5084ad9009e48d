r"""A policy from elsewhere: a function from the control env's observations to its actions.

With u = control_scale * act(observation) the next latent is N(prior_loc + scale u, scale^2 I), as
in the control env: a Gaussian with the prior's scale, whose KL is |u|^2 / 2 and whose log-ratio is
known. So it is rolled out and measured as any policy is.

If u is random, given the state s with any law q(u | s), the figures are those of the extended path
(x_0, u_0, x_1, u_1, .., x_K), in which every drawn u is written down. The policy's law and the
extended optimum are

    P(path) = p(x_0) prod_k q(u_k | s_k) N(x_{k+1}; prior_loc_k + scale_k u_k, scale_k^2),
    P*(path) = p(x_0) prod_k q(u_k | s_k) N(x_{k+1}; prior_loc_k, scale_k^2) e^r / Z.

In P* no factor but its own has u_k, so every q integrates to 1, from the last to the first: P* is a
law, its x-paths are the soft-optimal ones, and Z is the task's. In the ratio of the two q cancels:
its density need not be known, nor does it matter. Hence

- J = E_P[r - sum |u|^2 / 2] of the drawn u, and log Z - J = KL(P || P*). By the chain rule that is
  at least the KL of the x-paths, and of the samples. The rest is what the policy's own noise costs:
  it pays |u|^2 / 2 for every draw, also where the draws average out;
- e^(r - log-ratio), with the log-ratio given the drawn u, has the mean Z under P;
- accepted trajectories of the prior, with u_k drawn at each of their states, are draws of P*.

The same holds if u depends on the past of its episode, or on what was drawn before in it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ctrl_rl import gaussian, keys
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.dynamics import Observation, checked_action, drift_of, observation_of
from ctrl_rl.errors import ConfigError
from ctrl_rl.evaluation.samplers import PolicySampler
from ctrl_rl.policies import DenoisingPolicy

Act = Callable[[Observation], Any]

_PROBED = 3  # episodes of the call that shows whether a function fits


class ForeignPolicy(DenoisingPolicy):
    """A function of the control env's observations as a policy.

    Args:
        process: the MDP.
        act: observation of B episodes in step to actions [B, *S]; see `evaluate_policy`.
        control_scale: drift of an action of 1, in standard deviations of the step.

    Raises:
        ConfigError: `act` cannot be called, or gives something else than actions; here for the
            starts of a few episodes, and later for every batch.
    """

    def __init__(self, process: DenoisingProcess, act: Act, *, control_scale: float) -> None:
        super().__init__(process.kernel)
        if not callable(act):
            raise ConfigError(
                f"act is a {type(act).__name__}; give a function from observations to actions, "
                "such as lambda observation: model.predict(observation)[0]"
            )
        self.act, self.control_scale = act, control_scale
        generator = torch.Generator(device=process.kernel.scale.device).manual_seed(0)
        x = process.draw_start(_PROBED, generator)
        step = torch.zeros(_PROBED, dtype=torch.int64, device=x.device)
        with torch.no_grad():
            self.mean(x, step, process.draw_control(_PROBED, generator), x)

    def mean(
        self, x: Tensor, step: Tensor, control: Mapping[str, Tensor], prior_loc: Tensor
    ) -> Tensor:
        """Shift the prior's mean by the drift of the action."""
        action = self.act(observation_of(x, step, control))
        try:
            if isinstance(action, tuple):
                raise ConfigError(
                    f"a tuple of {len(action)}; give the actions alone, such as "
                    "model.predict(observation)[0]"
                )
            drift, _ = drift_of(
                checked_action(action, tuple(x.shape)), self.control_scale, x.device
            )
        except ConfigError as error:
            raise ConfigError(
                f"act, for {len(x)} episodes at step {int(step[0])}: {error}"
            ) from None
        return prior_loc + gaussian.expand_to(self.kernel.scale[step], x) * drift


class ForeignSampler(PolicySampler):
    """Rolls out a function, always for episodes that are in step, as the control env does.

    Args:
        process: the MDP.
        act: see `ForeignPolicy`.
        control_scale: likewise.
    """

    def __init__(self, process: DenoisingProcess, act: Act, *, control_scale: float) -> None:
        super().__init__(process, ForeignPolicy(process, act, control_scale=control_scale))

    def log_ratio_on(
        self, episodes: TensorDict, condition: Mapping[str, float], batch_size: int
    ) -> Tensor:
        """As that of any policy, from the first step to the last: `act` may have a memory."""
        ratios = [episodes[keys.X].new_zeros(0)]
        for part in episodes.split(batch_size, 0) if len(episodes) else ():
            steps = [part[:, k : k + 1] for k in range(part.batch_size[1])]
            each = [super(ForeignSampler, self).log_ratio_on(s, condition, len(s)) for s in steps]
            ratios.append(torch.stack(each).sum(0))
        return torch.cat(ratios)
