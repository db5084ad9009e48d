"""D3PO against explicit loops, closed-form optima of its four forms, and VarGrad."""

import numpy as np
import pytest
import torch
from agent_tasks import StepShifts, oracles
from exact_tasks import ShiftPolicy
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import logsigmoid

from ctrl_rl import keys
from ctrl_rl.agents.d3po import D3po
from ctrl_rl.agents.parts.returns import episode_log_ratio, episode_reward
from ctrl_rl.agents.plan import RolloutPlan
from ctrl_rl.agents.vargrad import VarGrad
from ctrl_rl.envs.chain import DenoisingProcess
from ctrl_rl.envs.latent import LatentEnv
from ctrl_rl.envs.rollout import rollout
from ctrl_rl.errors import ConfigError
from ctrl_rl.runs import build
from ctrl_rl.runs.compose import compose

SCORE = RolloutPlan(gradients="score")


def process_with(*words: str) -> DenoisingProcess:
    return build.build_process(compose("train", ["env=gaussian", *words]))


# The task's own noise all but forgets the start; noise that ends early does not.
FORGETS = process_with()
REMEMBERS = process_with("+prior.scheduler.beta_end=0.005")


def shifts(process: DenoisingProcess, factors: Tensor | float) -> StepShifts:
    """The soft optimum's shifts times factors, [labels, K] or one."""
    policy = StepShifts(process)
    wide = torch.as_tensor(factors)[..., None]
    with torch.no_grad():
        policy.shifts.copy_(ShiftPolicy(process).shifts * wide)
    return policy


def episodes(process, policy, n=64, seed=0, **given) -> TensorDict:
    return rollout(LatentEnv(process, num_envs=n, seed=seed), policy, plan=SCORE, **given)


def outward(agent: D3po, process, factors, batches=60) -> tuple[Tensor, Tensor]:
    """Derivative of the loss along the soft optimum's shift of every label and step.

    Returns:
        [labels, K] mean over batches, and its standard error.
    """
    policy, rows = shifts(process, factors), []
    direction = ShiftPolicy(process).shifts
    for seed in range(batches):
        loss = agent.loss(episodes(process, policy, n=384, seed=seed))["loss_d3po"]
        (gradient,) = torch.autograd.grad(loss, policy.shifts)
        rows.append((gradient * direction).sum(-1))
    found = torch.stack(rows)
    return found.mean(0), found.std(0) / batches**0.5


def gaussian_slope(variance: float) -> float:
    """E[sigma'(N(0, variance))] by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    chance = 1 / (1 + np.exp(-(variance**0.5) * nodes))
    return float((weights * chance * (1 - chance)).sum() / weights.sum())


def factor_where(variance: float, slope: float) -> float:
    """The c from 0 to 1 with c psi(c^2 variance) = slope, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        c = (low + high) / 2
        too_large = c * gaussian_slope(c * c * variance) > slope
        low, high = (low, c) if too_large else (c, high)
    return low


def closed_form_factors(process: DenoisingProcess, credit: str) -> Tensor:
    """c of every label and step: c psi(c^2 V_k) = psi(V + V_0), or V in V_k's place for paths."""
    rows = []
    for oracle in oracles(process):
        # A difference of two rewards has twice the variance of one.
        shares = 2 * oracle.sigmas**2 * (oracle.value_weights[1:] ** 2).sum(1)
        slope = gaussian_slope(shares.sum() + 2 * (oracle.value_weights[0] ** 2).sum())
        parts = shares if credit == "step" else [shares.sum()] * len(shares)
        rows.append([factor_where(variance, slope) for variance in parts])
    return torch.tensor(rows)


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["path", "step"])
@pytest.mark.parametrize("preferences", ["soft", "hard"])
def test_loss_is_the_mean_over_partners_of_every_episode(preferences, credit):
    label = torch.tensor([0] * 2 + [1] * 5 + [2])
    batch = episodes(FORGETS, shifts(FORGETS, 0.5), n=8, control={"direction": label})
    agent = D3po(preferences=preferences, credit=credit, temperature=0.7)
    ratios = batch[keys.LOG_RATIO]
    parts = ratios.T if credit == "step" else [ratios.sum(1)]
    reward, total, agreed = episode_reward(batch), torch.zeros(()), 0.0
    for i in range(8):
        partners = [j for j in range(8) if j != i and label[j] == label[i]]
        for j in partners:
            chance = (reward[i] - reward[j]).sigmoid()
            if preferences == "hard":
                chance = chance.round()
            for part in parts:
                margin = 0.7 * (part[i] - part[j])
                cost = -chance * logsigmoid(margin) - (1 - chance) * logsigmoid(-margin)
                total = total + cost / (8 * len(partners))
            same = (reward[i] > reward[j]) == (ratios[i].sum() > ratios[j].sum())
            agreed += float(same) / (7 * len(partners))
    result = agent.loss(batch)
    torch.testing.assert_close(result["loss_d3po"], total)
    assert result["agreement"].item() == pytest.approx(agreed)
    assert result["alone"] == 1 / 8


def test_a_tie_is_half_a_win_for_each():
    batch = episodes(FORGETS, shifts(FORGETS, 0.5), n=8, control={"direction": 1}).detach()
    batch[keys.NEXT_REWARD].zero_()
    hard, soft = (D3po(preferences=kind).loss(batch)["loss_d3po"] for kind in ("hard", "soft"))
    torch.testing.assert_close(hard, soft)


def test_a_batch_without_pairs_teaches_nothing():
    policy = shifts(FORGETS, 0.5)
    batch = episodes(FORGETS, policy, n=3, control={"direction": torch.tensor([0, 1, 2])})
    result = D3po().loss(batch)
    assert result["loss_d3po"] == 0 and result["alone"] == 1
    (gradient,) = torch.autograd.grad(result["loss_d3po"], policy.shifts)
    assert not gradient.any()


def test_small_gaps_leave_half_of_vargrad():
    """Less the labels' entropy, (m - gap)^2 / 8 per pair: half its loss and half its gradient."""
    policy = shifts(FORGETS, 0.003)
    batch = episodes(FORGETS, policy, n=48)
    batch[keys.NEXT_REWARD] *= 0.01
    loss, other = D3po().loss(batch)["loss_d3po"], VarGrad().loss(batch)["loss_vargrad"]
    (found,) = torch.autograd.grad(loss, policy.shifts, retain_graph=True)
    (expected,) = torch.autograd.grad(other, policy.shifts)
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected / 2, rtol=2e-3, atol=2e-3 * size)
    # The entropy is what is left where every log-ratio is its episode's reward.
    best = batch.detach().apply(torch.zeros_like)
    best[keys.NEXT_REWARD], best[keys.CONTROL] = batch[keys.NEXT_REWARD], batch[keys.CONTROL]
    best[keys.LOG_RATIO] = batch[keys.NEXT_REWARD][..., 0]
    excess = loss.double() - D3po().loss(best)["loss_d3po"].double()
    # float32 holds a loss near log 2 to 1e-7, and half of VarGrad's is 100 times that.
    assert excess.item() == pytest.approx(other.item() / 2, rel=0.02)


# --- the optima -------------------------------------------------------------------------------


def test_soft_preferences_of_whole_paths_lead_to_the_soft_optimum():
    mean, error = outward(D3po(), FORGETS, 1.0)
    assert (mean.abs() < 4.5 * error).all()
    for factor, sign in ((0.9, -1), (1.1, 1)):  # the same test sees a tenth
        mean, error = outward(D3po(), FORGETS, factor)
        assert (sign * mean.sum(1) > 4.5 * error.norm(dim=1)).all()


def test_loss_at_the_soft_optimum_is_the_entropy_of_the_preferences():
    """Every pair is at its minimum there, if the start is forgotten."""
    batch = episodes(FORGETS, shifts(FORGETS, 1.0), n=256, control={"direction": 1})
    left = episode_reward(batch) - episode_log_ratio(batch)
    assert left.std() < 0.02
    gap = episode_reward(batch)[:, None] - episode_reward(batch)
    chance = gap[~torch.eye(256, dtype=torch.bool)].sigmoid()
    entropy = -(chance * chance.log() + (1 - chance) * (1 - chance).log()).mean()
    assert D3po().loss(batch)["loss_d3po"].item() == pytest.approx(entropy.item(), abs=1e-4)


@pytest.mark.parametrize("credit", ["path", "step"])
def test_optimum_in_closed_form_where_the_start_is_remembered(credit):
    factors = closed_form_factors(REMEMBERS, credit)
    assert (factors < 1).all()
    mean, error = outward(D3po(credit=credit), REMEMBERS, factors)
    assert (mean.abs() < 4.5 * error).all()
    mean, error = outward(D3po(credit=credit), REMEMBERS, 1.0)  # not the soft optimum
    assert (mean.sum(1) > 4.5 * error.norm(dim=1)).all()


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_hard_preferences_have_no_optimum(factor):
    mean, error = outward(D3po(preferences="hard"), FORGETS, factor)
    assert (mean.sum(1) < -4.5 * error.norm(dim=1)).all()


def test_temperature_divides_the_reward():
    """Half the soft optimum's drift is the optimum at 2 nats: 2 L = r, up to a constant."""
    mean, error = outward(D3po(temperature=2.0), FORGETS, 0.5)
    assert (mean.abs() < 4.5 * error).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"preferences": "sfot"}, "agent.preferences='sfot'.*soft"),
        ({"credit": "steps"}, "agent.credit='steps'.*step"),
        ({"temperature": 0.0}, "agent.temperature=0.0 must be > 0"),
        ({"minibatches": 0}, "agent.minibatches=0"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ConfigError, match=message):
        D3po(**setting)
