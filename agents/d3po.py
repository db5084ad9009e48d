r"""D3PO: preferences between pairs of episodes, learned by the policy's log-ratios (online DPO).

Objective, minimised over the policy, with the defaults (soft preferences, whole paths):

    E[ -p_ij log sigma(m_ij) - p_ji log sigma(m_ji) ],      p_ij = sigma(r_i - r_j),

    m_ij = temperature * (L_i - L_j),    L_i = sum_k log_ratio_k of episode i,

over pairs i, j of the policy's own episodes with the same condition. log_ratio_k is
log pi(a_k | s_k) - log p_ref(a_k | s_k) and p_ij the chance that i wins in the Bradley-Terry model.
The minimum of every pair is at m_ij = r_i - r_j. If all starts were alike, all pairs would be there
at pi = p_ref e^{(r - v_0) / temperature}: for the default of 1 nat the soft optimum. A family that
does not contain it ends close to it, though not at the optimum of J in the family.

Near the minimum, where the gaps are small, the cross-entropy is the preferences' entropy
+ (m_ij - r_i + r_j)^2 / 8: the entropy plus half the loss of `vargrad`. A pair with a large gap
counts less.

The start x_0 is given, not chosen. At the soft optimum L_i = r_i - v_0(x_0). A difference of starts
therefore looks like noise on the preference, and the answer to noisy preferences is more timid.
With an affine prior and a linear reward the optimum is the soft one's drift times c,
c psi(c^2 V) = psi(V + V_0), where psi(v) = E[sigma'(N(0, v))], V is the variance of a difference of
two rewards given their starts and V_0 is what the starts add. Where the start is all but forgotten,
c is all but 1. The published code avoids this: both episodes of a pair share x_0.

Two settings are the paper's, and have other optima:
- `credit=step` puts each step's log-ratios into a separate sigmoid and sums the losses: each step
  must account for the whole preference alone. In the same linear case the drift of each step is
  that of the soft optimum times c, c psi(c^2 V_k) = psi(V + V_0), V_k being step k's share of V:
  shorter at every step.
- `preferences=hard` lets the higher reward win: p_ij = 1, 0, or 1/2 for a tie. Only the order of
  rewards counts. Where a family can always widen the margins, as in the linear case, nothing is
  optimal: the policy drifts on for as long as it is trained, more slowly at a larger temperature.

References: Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward
Model", CVPR 2024, arXiv 2311.13231; Rafailov et al., "Direct Preference Optimization", NeurIPS
2023, arXiv 2305.18290; from offline pairs: Wallace et al., "Diffusion Model Alignment Using Direct
Preference Optimization", CVPR 2024, arXiv 2311.12908.

Deviations:
- Preferences come from the reward, by default as probabilities.
- All pairs within a condition instead of disjoint ones: a pair is arithmetic on two numbers, and
  the mean over all has less variance for the same network calls. An episode's partners share its
  weight: conditions count by their share of the batch, as in `vargrad`.
- The probability ratios are not clipped.

Metrics: `loss_d3po`; `agreement` share of pairs that the whole path's log-ratios rank as the reward
does; `alone` share of the batch's episodes that contribute nothing because no other has their
condition.
"""

from typing import Literal

from tensordict import TensorDict
from torch.nn.functional import binary_cross_entropy_with_logits

from ctrl_rl import keys
from ctrl_rl.agents.agent import Agent
from ctrl_rl.agents.parts.advantages import condition_index
from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.errors import ConfigError, did_you_mean

_CHOICES = {"preferences": ("soft", "hard"), "credit": ("path", "step")}


class D3po(Agent):
    """Preference optimisation on pairs of episodes of one condition.

    Args:
        preferences: `soft` for the chance to win, `hard` for the higher reward.
        credit: `path` for one comparison per pair, `step` for one per pair and step.
        temperature: nats of reward per nat of log-ratio, the paper's beta; > 0.
        epochs: passes over every rollout.
        minibatches: optimizer steps per pass; pairs are formed within a minibatch.

    Raises:
        ConfigError: an unknown setting, or a temperature that is not > 0.
    """

    needs_equal_conditions = True

    def __init__(
        self,
        *,
        preferences: Literal["soft", "hard"] = "soft",
        credit: Literal["path", "step"] = "path",
        temperature: float = 1.0,
        epochs: int = 1,
        minibatches: int = 1,
    ) -> None:
        super().__init__()
        for name, value in {"preferences": preferences, "credit": credit}.items():
            if value not in _CHOICES[name]:
                hint = did_you_mean(str(value), _CHOICES[name])
                raise ConfigError(f"unknown agent.{name}={value!r}; {hint}")
        if not temperature > 0:
            raise ConfigError(f"agent.temperature={temperature} must be > 0")
        self.preferences, self.credit, self.temperature = preferences, credit, temperature
        self.plan = RolloutPlan(gradients="score", epochs=epochs, minibatches=minibatches)

    def loss(self, rollout: TensorDict) -> TensorDict:
        """Cross-entropy of the preferences, averaged over the partners of every episode."""
        index = condition_index(rollout)
        paired = (index[:, None] == index).fill_diagonal_(False)
        partners = paired.sum(1, keepdim=True)
        weight = paired / (partners.clamp(min=1) * len(index))  # [B, B]

        reward, path = episode_reward(rollout), episode_log_ratio(rollout)
        gap, path_gap = reward[:, None] - reward, path[:, None] - path  # [B, B]
        wins = gap.sigmoid() if self.preferences == "soft" else (gap.sign() + 1) / 2
        terms = path[:, None] if self.credit == "path" else rollout[keys.LOG_RATIO]  # [B, 1 or K]
        margin = self.temperature * (terms[:, None] - terms)  # [B, B, 1 or K]
        target = wins[..., None].expand_as(margin)
        cost = binary_cross_entropy_with_logits(margin, target, reduction="none").sum(-1)
        return TensorDict(
            {
                "loss_d3po": (weight * cost).sum(),
                "agreement": (weight * (gap * path_gap > 0)).sum() / weight.sum().clamp(min=1e-12),
                "alone": (partners == 0).float().mean(),
            },
            batch_size=[],
        )
